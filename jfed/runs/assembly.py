"""What the settings of a run make: its network, its tiers, and the federation."""

from jfed import data as data_lib
from jfed import tiers as tiers_lib
from jfed.engine.devices import make_mesh
from jfed.models.presets import ModelConfig
from jfed.runs.config import RunConfig
from jfed.simulation.federation import Federation


def set_up(config: RunConfig) -> tuple[Federation, data_lib.Dataset, ModelConfig]:
    """Loads the data, deals it out, builds the model, and checks everything; compiles nothing."""
    population, seed = config.population, config.seed
    # What can fail without the data does so before they are read.
    tiers = tiers_lib.make_tiers(config.network.make(classes=10, channels=3), config.tiers)
    tiers_lib.assign(
        population.clients, len(tiers.members), population.shares, seed=seed, idle=tiers.idle
    )
    make_mesh(config.engine.devices)
    data = data_lib.load(config.data, seed=seed)
    network = config.network.make(data.num_classes, data.image_shape[-1])
    partition = data_lib.partition(
        config.partition, data.train.labels, population.clients, seed=seed
    )
    federation = Federation(
        data,
        partition,
        tiers_lib.make_tiers(network, config.tiers),
        rounds=config.rounds,
        cohort=population.cohort,
        shares=population.shares,
        draw_tiers=population.draw_tiers,
        client=config.client,
        server=config.server,
        evaluation=config.evaluation,
        augmentation=config.augmentation,
        engine=config.engine,
        faults=config.faults,
        seed=seed,
    )
    return federation, data, network
