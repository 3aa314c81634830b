"""The bundled model as a ready-made application, for tools that want one.

serve build serve_app.bundled:app -o service.yaml && serve run service.yaml
"""

from __future__ import annotations

from serve_app.app import build_app

app = build_app({"layout": "tp=2,ep=2"})
