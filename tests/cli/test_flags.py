"""The flags of `jfed run`: which there are, what they say, what they make of text."""

import dataclasses
import re
from collections.abc import Callable, Mapping

import pytest

from jfed.cli import flags, run_command
from jfed.cli.commands import main
from jfed.errors import ConfigError
from jfed.runs.config import run_preset

# Users' scripts know them by these names.
FLAGS = """
    --data --data-dir --image-size --train-examples --eval-examples
    --partition --alpha --shards-per-client --min-examples
    --clients --cohort --shares --draw-tiers
    --model --widths --shortcut --entry --solver --horizon --function
    --learn-steps --no-learn-steps --norm --unroll --no-unroll --dtype --conv --init --init-fresh
    --test-share --restart-schedule
    --method --iterations --sharing --ratios --scaler --depths --exits --distillation --ramp --able
    --rounds --seed
    --algorithm --mu --feddyn-alpha --ditto-strength --personal --h-over --head-share
    --codec-up --codec-down
    --dp-clip --dp-noise --dp-epsilon --dp-delta --dp-sampling --dp-accountant --dp-quantile
    --epochs --steps --batch-size --optimizer --learning-rate --schedule --momentum
    --optimizer-args --weight-decay --clip-norm --mask-absent-classes --no-mask-absent-classes
    --server-optimizer --server-learning-rate --server-momentum --server-optimizer-args
    --weights --aggregator --trim --krum-byzantine --krum-selected --clip-updates
    --dropout --stragglers --straggler-steps --non-finite --exploding --explosion --hostile --attack
    --attack-noise --attack-scale
    --devices-of-clients --draw-devices --no-draw-devices --utilisation --deadline
    --pad --flip --no-flip
    --eval-every --eval-iterations --eval-solvers --eval-batch-size --calibration-examples
    --metrics
    --local-test --finetune-epochs
    --devices --lanes --mapping --images
    --preset --workdir --checkpoint-every --checkpoint-keep --tensorboard --no-tensorboard --wandb
    --cache --no-cache --cache-dir --huge-pages --no-huge-pages --distributed --no-distributed
    --coordinator-address --num-processes --process-id
    --help
"""


@pytest.fixture
def help_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    return capsys.readouterr().out


def test_the_flags_are_these(help_text):
    lines = [line.strip("│ ") for line in help_text.splitlines()]
    heads = [line.split("  ")[0] for line in lines if line.startswith("-")]
    found = [flag for head in heads for flag in re.findall(r"--[a-z][a-z-]*", head)]
    assert len(found) == len(set(found))
    assert set(found) == set(FLAGS.split())


def test_each_flag_says_what_it_does(help_text):
    text = " ".join(line.strip("│ ") for line in help_text.splitlines())
    for entry in re.split(r" (?=--[a-z])", text)[1:]:
        if not re.fullmatch(r"--[a-z-]+,|--help.*", entry):  # the first of a pair
            said = re.sub(r"^--\S+ ([A-Z]+ |\S*[{[|].*?[\]}] )?", "", entry)
            assert re.search(r"[a-z]{2,}.*\(default: ", said), entry
    assert "fixed to" not in text
    # Another setting is called by its flag, and nothing by no text.
    assert "in place of `--dp-noise`: the least noise" in text
    assert "that send `--explosion` times their update" in text
    assert "(default: none)" in text
    assert "(default: )" not in text
    # From where the setting is used, and what only that place can say.
    assert "scaled down to it; None for no clipping. (default: None)" in text
    assert "The last batch of an epoch holds what is left. (default: 16)" in text


def test_algorithms_and_arguments_of_optimizers_become_settings():
    args = "--preset smoke --algorithm fedper --personal own/* --server-optimizer adam"
    args += " --server-optimizer-args eps=0.001 b1=0.9 --optimizer-args nesterov=true"
    assert run_command.parse(args.split()).run == run_preset("smoke").replace(
        algorithm="fedper",
        personal=("own/*",),
        server_optimizer="adam",
        server_optimizer_args={"b1": 0.9, "eps": 0.001},
        optimizer_args={"nesterov": True},
    )
    with pytest.raises(ConfigError, match=r"^an optimizer's argument must .*, got 'eps'.$"):
        run_command.parse("--server-optimizer-args eps".split())
    with pytest.raises(ConfigError, match=r"must look like eps=0\.001, got 'eps'"):
        flags.parse_argument("eps")


def test_text_becomes_settings():
    args = (
        "--preset smoke --iterations 3-2 1 --eval-iterations 2 --no-flip --seed 4 --data-dir here"
    )
    args += " --server-optimizer adam --eval-every 0 --ratios None --widths 4 8 --checkpoint-keep 7"
    given = run_command.parse(args.split())
    assert given.run == run_preset("smoke").replace(
        iterations=((3, 2), 1),
        eval_iterations=(2,),
        seed=4,
        data_dir="here",
        server_optimizer="adam",
        eval_every=0,
        widths=(4, 8),
    )
    assert given.launch == run_command.LaunchConfig(
        preset="smoke",
        checkpoints=dataclasses.replace(run_command.LaunchConfig().checkpoints, keep=7),
    )


def test_iterations_are_one_number_or_one_a_stage():
    assert flags.parse_iterations("4") == 4
    assert flags.parse_iterations("3-2-2") == (3, 2, 2)
    assert flags.parse_iterations("-1") == -1
    with pytest.raises(ConfigError, match="'3x2'"):
        flags.parse_iterations("3x2")


@dataclasses.dataclass(frozen=True)
class Part:
    """Fields of which a command line can give all, something, or nothing.

    Attributes:
      size: how large.
      optimizer: by name, or a function.
      weights: a function, or none.
      table: of functions, by name.
    """

    size: int = 1
    optimizer: str | Callable[[float], object] = "sgd"
    weights: Callable[[int], float] | None = None
    table: Mapping[str, Callable[[int], float]] | None = dataclasses.field(
        default=None, metadata={"flag": False}
    )


@dataclasses.dataclass(frozen=True)
class Whole:
    """Two of a kind would not do; one is enough.

    Attributes:
      part: the one.
    """

    part: Part


def test_functions_have_no_flags_and_stay_as_they_are():
    def parse(*args):
        whole = Whole(Part(weights=float, table={"a": float}))
        return flags.parse(whole, list(args), names=lambda p: p[5:], prog="x", description="")

    assert parse("--size", "3") == Whole(Part(3, "sgd", float, {"a": float}))
    assert parse("--optimizer", "adam") == Whole(Part(1, "adam", float, {"a": float}))
    for flag in ("--weights", "--table"):
        with pytest.raises(ConfigError, match=f"Unrecognized options: {flag}"):
            parse(flag, "3")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--learning-rate -1", "learning_rate must be a number, above 0, got -1"),
        ("--server-learning-rate 0", "server learning_rate must be a number, above 0, got 0"),
        ("--dropout 0.7 --exploding 0.7", "must sum to at most 1"),
        ("--model odenet-21", "unknown model 'odenet-21'"),
        ("--checkpoint-every 0", "checkpoint_every must be 1 or more, got 0"),
        ("--rounds 0", "rounds must be 1 or more, got 0"),
        ("--rounds x", "--rounds: invalid literal for int() with base 10: 'x'"),
        (
            "--learning-rat 3",
            "--learning-rat, 3. Did you mean --learning-rate or --server-",
        ),
        ("--data", "Missing value for argument '--data'"),
        ("--iterations 3x2", "or like 3-2-2 for counts per stage, got '3x2'"),
        ("--algorithm feddyn", "needs feddyn_alpha, got none"),
        ("--server-momentum 3", "momentum of server optimizer 'sgd' must be from 0 to below 1"),
        ("--eval-every -1", "eval_every must be 0 or more, got -1"),
        (
            "--preset smoke --method heterofl --model preresnet-20",
            "(3, 3, 3) must name as many stages. --widths (4, 4) is the preset's.",
        ),
    ],
)
def test_what_a_dataclass_refuses_is_an_error_of_the_command(args, message, capsys):
    assert main(["run", *args.split()]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("jfed: error: ")
    assert message in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""


def test_only_what_a_preset_decides_is_called_so():
    args = "--preset smoke --method heterofl --model preresnet-20 --widths 4 8"
    with pytest.raises(ConfigError, match=r"must name as many stages\.$"):
        run_command.parse(args.split())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("report --styl x", "Unrecognized options: --styl, x. Did you mean --style?"),
        ("models --size q", "--size: invalid literal for int() with base 10: 'q'."),
        ("report nowhere", "no finished run among ['nowhere']."),
    ],
)
def test_other_commands_say_it_in_one_line_too(command, message, capsys):
    assert main(command.split()) == 2
    assert capsys.readouterr().err == f"jfed: error: {message}\n"


@pytest.mark.parametrize("method", [["--method", "heterofl"], ["--method=heterofl"]])
def test_a_method_that_is_given_has_not_the_iterations_of_the_preset(method):
    run = run_command.parse(["--preset", "smoke", *method, "--ratios", "0.5", "1"]).run
    assert run.tiers.iterations is None
    assert run_command.parse(["--preset", "smoke"]).run.tiers.iterations == (1, 2)
    kept = ["--preset", "smoke", "--method", "exclusive", "--able", "1", "--iterations", "3"]
    assert run_command.parse(kept).run.tiers.iterations == (3,)
