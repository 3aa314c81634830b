"""`python -m serve_app` is `qwen3-dist`."""

from serve_app.cli import main

raise SystemExit(main())
