"""The first thing to run on a machine with GPUs: `make gpu-check`, or `python -m benchmarks.gpu_check`.

    __main__      reads the command line, runs the stages one after the other, writes the JSON, ends with the verdict
    supervisor    runs one stage in a process group of its own and ends it at its deadline (imports no torch)
    report        what came of checks and stages; the verdict (imports no torch)
    stage         what runs in a stage's process: its checks, one after the other
    parity, rates, experts    the checks of each stage

A check is a named function. It returns figures, or raises; one that fails does not keep others from running.
"""
