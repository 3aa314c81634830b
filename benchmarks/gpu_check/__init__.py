"""Checks and benchmarks for a machine with GPUs: `make gpu-check`, or `python -m benchmarks.gpu_check`.

    __main__      command line: runs the stages, writes the JSON file, prints the verdict
    supervisor    runs one stage in a process group and kills it at its deadline (no torch)
    report        results of checks and stages, and the verdict (no torch)
    stage         main function of a stage's process: runs its checks
    check         types that the modules of stages use
    machine       first stage: GPUs, driver, versions, packages
    parity, graphs, rates, experts, faults, nccl    the checks of each stage
    models        the models that checks run, and their comparison with the reference
    on_ranks      runs collectives on ranks, for nccl
    planted       ranks with faults, for faults

A check is a named function that returns figures or raises. The others run even if one fails.
"""
