"""One driver per system, run by the interpreter that has the system installed: `python DRIVER MODEL WORK.json [...]`.

A driver prints `{"ready": true}` after its first token, then `{"row": ..., "seconds": [...]}` for each row
(`driving.py`). Drivers import nothing of this project; only `ours.py` does.
"""
