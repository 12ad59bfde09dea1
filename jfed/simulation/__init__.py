"""The federation on its devices, its rounds, and what they record.

Each module has one subject:

    federation.py            a federation set up, its state, a round of it
    checks.py                what models, optimizers and algorithms must be
    population.py            who takes part, in which tier, and what each client does
    groups.py                tiers that share a program, and what their clients are packed on
    programs.py              the compiled programs: what decides them, their arguments
    cohort_training.py       a round's clients trained, and merged
    training_images.py, client_rows.py   where images and the clients' memory lie
    testing.py               tests of the global model and of clients
    evaluation.py, local_tests.py, scores.py   their programs, and metrics
    training_costs.py        operations and memory that training takes
    measured_traffic.py      bytes of clients' messages
    device_profiles.py, simulated_time.py   the clients' devices, and a clock
    loop.py, under_way.py, records.py   all rounds, and what each ends with
    prediction.py, exports.py   what trained models are used for
"""
