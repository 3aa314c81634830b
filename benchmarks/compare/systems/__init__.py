"""One driver per system, each run by the interpreter that has the system: `python DRIVER MODEL WORK.json [...]`.

A driver prints `{"ready": true}` once it has made its first token, then `{"row": ..., "seconds": [...]}` for
each row (`driving.py`). Drivers import nothing of this project but what they measure.
"""
