"""`jfed benchmark`: jfed and its rivals on the same work, side by side in one run.

Each contender runs in a process of its own; their turns are interleaved. The modules:

    settings.py       what a run of the benchmark is asked to do
    tasks.py          the work: a federation that every contender trains
    jax_runners.py    jfed, a Python loop over a jitted step, vmap over clients
    torch_networks.py, torch_runner.py, fedjax_runner.py    the rivals
    matmul.py         the machine's peak, by matrix products
    contenders.py     who takes part, and how each is built
    workers.py        a contender's process
    timing.py, turns.py   interleaved repeats, and whether all computed the same
    sections.py       which contenders and sizes each section has
    results.py, figures.py, racing.py   tables, figures, and the run itself
"""
