"""The first thing to run on a machine with GPUs: `make gpu-check`, or `python -m benchmarks.gpu_check`.

    __main__      reads the command line, runs the stages one after the other, writes the JSON, ends with the verdict
    supervisor    runs one stage in a process group and ends it at its deadline (imports no torch)
    report        what came of checks and stages; the verdict (imports no torch)
    stage         what runs in a stage's process: checks, one after the other
    check         what a stage's module is written with
    machine       cards, driver, versions, packages; without it nothing else runs
    parity, graphs, rates, experts, faults, nccl    the checks of each stage
    models        the models that checks run, and their comparison with the reference
    on_ranks      collectives of ranks, for nccl
    planted       ranks that fail, for faults

A check is a named function. It returns figures, or raises; one that fails does not keep others from running.
"""
