"""A small program that is built as a training program is, whose FLOPs are known in closed form."""

import jax
import jax.numpy as jnp

from jfed.models.counted_loops import repeat

BATCH, SIDE, WIDTH = 4, 8, 6  # of images `[SIDE, SIDE, 3]`; then half the side, twice the width
STEPS, CLIENTS = 12, 3
LENGTHS = {"turns": CLIENTS, "steps": STEPS / CLIENTS, "ode0": 2, "ode1": 5}


def conv(x, kernel, stride=1, **options):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=dims, **options
    )


def net(params, x, counts, largest):
    """A convolution, an ODE block, a convolution of stride 2, an ODE block, a product."""
    z = conv(x, params["stem"])
    for k in range(2):
        if k:
            z = conv(z, params["down"], stride=2)
        with jax.named_scope(f"ode{k}"):
            kernel = params[f"ode{k}"]
            bound = None if largest is None else largest[k]
            step = lambda i, z, kernel=kernel: z + jnp.tanh(conv(z, kernel))  # noqa: E731
            z = repeat(step, z, counts[k], most=8, largest=bound)
    return z.mean((1, 2)) @ params["head"]


def train(params, images, labels, order, counts, length, *, lanes):
    """Lanes that take gradient steps; what they train is begun and delivered now and then."""

    def loss(local, rows, counts, largest):
        logits = net(local, images[rows], counts, largest)
        right = jax.nn.one_hot(labels[rows], logits.shape[-1], dtype=logits.dtype)
        return -(jax.nn.log_softmax(logits) * right).sum()

    def step(local, rows, counts, largest):
        gradient = jax.grad(loss)(local, rows, counts, largest)
        return jax.tree.map(lambda p, g: p - 0.1 * g, local, gradient)

    def one_step(i, local):
        if lanes == 1:
            one = step(jax.tree.map(lambda x: x[0], local), order[0, i], counts[0], None)
            return jax.tree.map(lambda x: x[None], one)
        lane = lambda x, rows, n: step(x, rows, n, counts.max(0))  # noqa: E731
        return jax.vmap(lane)(local, order[:, i], counts)

    def turn(carry):
        first, total = carry
        scaled = lambda p: jnp.broadcast_to(p, (lanes, *p.shape)) * first.astype(p.dtype)  # noqa: E731
        local = jax.tree.map(scaled, params)
        with jax.named_scope("steps"):
            i, _, local = jax.lax.while_loop(
                lambda now: now[1],
                lambda now: (now[0] + 1, now[0] % 4 < 3, one_step(now[0], now[2])),
                (first, first < length, local),
            )
        return i, jax.tree.map(lambda t, x: t + x.sum(0), total, local)

    zero = jax.tree.map(jnp.zeros_like, params)
    with jax.named_scope("turns"):
        return jax.lax.while_loop(lambda carry: carry[0] < length, turn, (jnp.int32(0), zero))[1]


def compiled_text(lanes, device=None, dtype=jnp.float32):
    """The training program, compiled for a device of a target or for this CPU."""
    sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)

    def shape(*dims, dtype=dtype):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    c = WIDTH
    params = {
        "stem": shape(3, 3, 3, c),
        "ode0": shape(3, 3, c, c),
        "down": shape(3, 3, c, 2 * c),
        "ode1": shape(3, 3, 2 * c, 2 * c),
        "head": shape(2 * c, 10),
    }
    integers = [
        shape(*dims, dtype=jnp.int32) for dims in [(50,), (lanes, 20, BATCH), (lanes, 2), ()]
    ]
    images = shape(50, SIDE, SIDE, 3)
    program = jax.jit(train, static_argnames="lanes")
    return program.lower(params, images, *integers, lanes=lanes).compile().as_text()


def forward(side, channels_in, channels_out):
    """FLOPs of a 3x3 convolution of a batch, `side` being its output's."""
    return 2 * BATCH * side**2 * 9 * channels_in * channels_out


def step_flops():
    """Of a step of a lane: all but the stem also need the gradient of their input."""
    c = WIDTH
    stem = 2 * forward(SIDE, 3, c)
    blocks = 3 * (2 * forward(SIDE, c, c) + 5 * forward(SIDE // 2, 2 * c, 2 * c))
    down = 3 * forward(SIDE // 2, c, 2 * c)
    return stem + blocks + down + 3 * (2 * BATCH * 2 * c * 10)
