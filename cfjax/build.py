"""From a config to the values that the rooms below take; ConfigDicts go no deeper than here."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cfjax import clean_lengths, flops, plans, sharding, train_state
from cfjax.build_data import DTYPES, latent_scale, sees_latents
from cfjax.build_documents import has_text, slots, vocabulary
from cfjax.diffusion.schedule import NoiseSchedule, make_noise_schedule, respace
from cfjax.diffusion.solvers import Solver
from cfjax.document_objective import DocumentObjective
from cfjax.documents import lay_out
from cfjax.errors import UserError, check_choice
from cfjax.factorization import Factorization, max_clean_tokens
from cfjax.guidance import Guidance
from cfjax.models.causal_fusion import CausalFusion, in_compute_dtype
from cfjax.models.multimodal import MultimodalCausalFusion
from cfjax.objective import Objective
from cfjax.optimizer import OptimizerSettings, make_optimizer
from cfjax.rng import stream_key
from cfjax.sampling import SamplingSettings
from cfjax.train_step import TrainProgram, TrainStepSettings


def model(config: ConfigDict) -> CausalFusion:
    """The transformer for the images of `config.data`."""
    model, data = config.model, config.data
    check_choice("dtype", model.dtype, DTYPES)
    check_choice("gradient dtype", model.gradient_dtype, DTYPES)
    if data.size % model.patch_size:
        raise UserError(
            f"model.patch_size {model.patch_size} does not divide data.size {data.size}; choose a"
            " divisor."
        )
    rows = data.size // model.patch_size
    module, of_text = CausalFusion, {}
    if has_text(config):
        module = MultimodalCausalFusion
        of_text = {
            "vocabulary_size": vocabulary(config).size,
            "has_tied_head": config.text.tied_head,
        }
    return module(
        width=model.width,
        depth=model.depth,
        num_heads=model.num_heads,
        grid=(rows, rows),
        token_width=model.patch_size**2 * data.channels,
        num_classes=data.num_classes,
        num_condition_tokens=model.num_condition_tokens,
        condition_repeats=model.condition_repeats,
        position_embedding=model.position_embedding,
        position_scale=model.position_scale,
        mlp_ratio=model.mlp_ratio,
        dtype=DTYPES[model.dtype],
        gradient_dtype=DTYPES[model.gradient_dtype],
        scan_layers=model.scan_layers,
        remat_policy=model.remat_policy,
        attention=model.attention,
        **of_text,
    )


def sampling_model(config: ConfigDict) -> CausalFusion:
    """The transformer as generation runs it: layers in a loop, which is faster with a KV cache.

    The parameters are those of `model`, in the dtype that `config.sampling.dtype` may name.
    """
    transformer = model(config).clone(scan_layers=True)
    if not config.sampling.dtype:
        return transformer
    check_choice("sampling.dtype", config.sampling.dtype, DTYPES)
    return transformer.clone(dtype=DTYPES[config.sampling.dtype])


def factorization(config: ConfigDict) -> Factorization:
    """The AR axis in training."""
    return Factorization(**config.factorization)


def noise_schedule(config: ConfigDict) -> NoiseSchedule:
    """The noise axis in training, all T timesteps."""
    return make_noise_schedule(config.diffusion.noise_schedule, config.diffusion.num_timesteps)


def objective(config: ConfigDict) -> Objective | DocumentObjective:
    """The training objective."""
    diffusion, loss = config.diffusion, config.loss
    of_images = Objective(
        factorization=factorization(config),
        schedule=noise_schedule(config),
        prediction_type=diffusion.prediction_type,
        timestep_sharing=diffusion.timestep_sharing,
        timesteps_per_ar_step=diffusion.timesteps_per_ar_step,
        ar_loss_weight=loss.ar_loss_weight,
        ar_loss_weight_schedule=loss.ar_loss_weight_schedule,
        noise_level_weighting=loss.noise_level_weighting,
        noise_level_gamma=loss.noise_level_gamma,
        class_dropout=loss.class_dropout,
    )
    if has_text(config):
        return DocumentObjective(of_images, loss.text_loss_weight)
    return of_images


def optimizer_settings(config: ConfigDict) -> OptimizerSettings:
    """The optimizer, but for the decay of the EMA."""
    optimizer = config.optimizer
    return OptimizerSettings(
        learning_rate=optimizer.learning_rate,
        schedule=optimizer.schedule,
        warmup_steps=optimizer.warmup_steps,
        num_train_steps=config.train.num_train_steps,
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
    )


def check_counts(config: ConfigDict) -> None:
    """Refuses counts in `config.train` that are too low or do not fit, before anything is computed.

    Raises:
      UserError: the first of them.
    """
    for name in ("num_train_steps", "log_every", "checkpoint_every", "keep_checkpoints"):
        if config.train[name] < 1:
            raise UserError(f"train.{name} is {config.train[name]}, but must be at least 1.")
    keep_every, checkpoint_every = config.train.keep_every, config.train.checkpoint_every
    if keep_every < 0 or keep_every % checkpoint_every:
        raise UserError(
            f"train.keep_every is {keep_every}, but must be a multiple of train.checkpoint_every,"
            f" {checkpoint_every}; 0 keeps none."
        )


def mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices, or given ones, after checking that it divides batch and model."""
    sizes = config.mesh
    mesh = sharding.make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices)
    sharding.check_batch_divides(config.train.global_batch_size, mesh)
    check_mesh_divides_model(config, mesh)
    return mesh


def check_mesh_divides_model(config: ConfigDict, mesh: Mesh) -> None:
    """Refuses a mesh over whose axis `tensor` the model cannot be split.

    Raises:
      UserError: it does not divide the heads or the MLP.
    """
    sharding.check_axes_divide(
        mesh,
        activation_heads=config.model.num_heads,
        activation_mlp=int(config.model.mlp_ratio * config.model.width),
    )


def init_params(model: CausalFusion, num_clean: int = 1) -> Callable[[jax.Array], Any]:
    """A key to fresh parameters, boxed with their logical axes."""

    def init(key):
        positions = jnp.zeros((1, model.num_tokens), jnp.int32)
        return model.init(
            key,
            jnp.zeros(1, jnp.int32),
            jnp.zeros((1, num_clean, model.token_width)),
            jnp.zeros((1, 1, model.num_tokens, model.token_width)),
            jnp.zeros((1, 1, 1), jnp.int32),
            positions,
            positions,
        )["params"]

    return init


def init_sampling_params(model: CausalFusion) -> Callable[[jax.Array], Any]:
    """`init_params` in the dtypes in which generation holds them."""
    init = init_params(model)
    return lambda key: in_compute_dtype(init(key), model.dtype)


def init_state(
    model: CausalFusion, optimizer: optax.GradientTransformation
) -> Callable[[jax.Array], train_state.TrainState]:
    """A key to the state before the first train step, boxed with its logical axes."""
    init = init_params(model)
    return lambda key: train_state.create(init(key), optimizer)


def train_program(config: ConfigDict, mesh: Mesh) -> TrainProgram:
    """The train steps of a run over the devices of `mesh`.

    Raises:
      UserError: microbatches or buckets that can't be had, or a compiler option without a value.
    """
    transformer, optimizer = model(config), make_optimizer(optimizer_settings(config))
    settings = TrainStepSettings(
        model=transformer,
        objective=objective(config),
        optimizer=optimizer,
        patch_size=config.model.patch_size,
        ema_decay=config.optimizer.ema_decay,
        seed=config.seed,
        num_microbatches=config.train.num_microbatches,
        latent_scale=latent_scale(config),
    )
    batch_size, data = config.train.global_batch_size, config.data
    sharding.check_microbatches_divide(batch_size, settings.num_microbatches, mesh)
    lead = (batch_size, config.text.images_per_row) if has_text(config) else (batch_size,)
    shape = (*lead, data.size, data.size)
    if sees_latents(config):
        batch = {"moments": (*shape, 2 * data.channels)}
    else:
        batch = {"image": (*shape, data.channels)}
    batch = {name: (shape, jnp.float32) for name, shape in batch.items()}
    if has_text(config):
        row = lay_out([], slots(config), (1, 1, 1))
        batch |= {
            name: ((batch_size, *it.shape), it.dtype) for name, it in row.items() if name != "image"
        }
    else:
        batch["label"] = ((batch_size,), jnp.int32)
    rows = sharding.batch_sharding(mesh)
    return TrainProgram(
        settings=settings,
        mesh=mesh,
        abstract_state=sharding.abstract_sharded(
            init_state(transformer, optimizer),
            mesh,
            stream_key(config.seed, "init"),
            min_size=config.mesh.min_split_size,
        ),
        abstract_batch={
            name: jax.ShapeDtypeStruct(*it, sharding=rows) for name, it in batch.items()
        },
        clean_lengths=clean_length_buckets(config),
        compiler_options=compiler_options(config, mesh),
    )


def clean_length_buckets(config: ConfigDict) -> tuple[int, ...]:
    """The numbers of clean tokens, ascending, for which a run compiles a train step.

    Raises:
      UserError: `train.clean_length_buckets` is below 1, or above it with a split per example.
    """
    factorization_, num_buckets = factorization(config), config.train.clean_length_buckets
    clean_lengths.check_num_buckets(factorization_, num_buckets)
    transformer = model(config)
    if has_text(config):
        if num_buckets > 1:
            raise UserError(
                f"train.clean_length_buckets is {num_buckets}, but what follows an image sees all of"
                " its clean tokens; set it to 1."
            )
        return (transformer.num_tokens,)
    others = sequence_length(config, 0)

    def cost(num_clean):
        return flops.layer_flops(transformer, others + num_clean, others + num_clean)

    probabilities = clean_lengths.clean_length_probabilities(factorization_, transformer.num_tokens)
    return clean_lengths.bucket_lengths(probabilities, num_buckets, cost)


def compiler_options(config: ConfigDict, mesh: Mesh) -> dict[str, str]:
    """`train.tpu_compiler_options` by name, for a mesh of TPUs; none for other devices.

    Raises:
      UserError: an option is not of the form NAME=VALUE.
    """
    options = {}
    for option in config.train.tpu_compiler_options:
        name, equals, value = option.partition("=")
        if not (name and equals and value):
            raise UserError(
                f"train.tpu_compiler_options has {option!r}, which is not of the form NAME=VALUE."
            )
        options[name] = value
    return options if mesh.devices.flat[0].platform == "tpu" else {}


def sampling_settings(
    config: ConfigDict,
    split_sizes: Sequence[int] = (),
    num_known: int = 0,
    is_autoguided: bool = False,
) -> SamplingSettings:
    """How to sample.

    Args:
      config: read are `sampling`, `diffusion`, `factorization`, whether the model knows the null class,
        and the number of tokens.
      split_sizes: instead of those of `config.sampling`.
      num_known: tokens that are not generated.
      is_autoguided: whether a weaker model guides, rather than the null class.

    Raises:
      UserError: more AR steps than tokens, split sizes that don't sum to them, denoising steps that
        can't be had, or a value out of range.
    """
    sampling, diffusion = config.sampling, config.diffusion
    if sampling.images_per_device < 1:
        raise UserError(
            f"sampling.images_per_device is {sampling.images_per_device}, but must be at least 1."
        )
    num_generated = model(config).num_tokens - num_known
    sizes = ()
    if num_generated or split_sizes:
        sizes = plans.split_sizes(
            sampling.split, num_generated, sampling.num_ar_steps, tuple(split_sizes)
        )
    training = noise_schedule(config)
    budgets = plans.denoising_budgets(sampling.denoising_steps, len(sizes))
    respaced = {it: respace(training, it, sampling.timestep_spacing) for it in set(budgets)}
    if sees_latents(config) and (sampling.clip_x_start or sampling.dynamic_threshold):
        raise UserError(
            "sampling.clip_x_start and sampling.dynamic_threshold are for pixels, which are in [-1, 1];"
            " this model generates latents, so set them to False and 0."
        )
    settings = SamplingSettings(
        split_sizes=sizes,
        schedules=tuple(respaced[budget] for budget in budgets),
        token_order=sampling.token_order,
        block_size=config.factorization.block_size,
        dilation_stride=config.factorization.dilation_stride,
        solver=Solver(
            name=sampling.solver,
            prediction_type=diffusion.prediction_type,
            variance=sampling.variance,
            eta=sampling.eta,
            clip_x_start=sampling.clip_x_start,
            dynamic_threshold=sampling.dynamic_threshold,
            temperature=sampling.temperature,
        ),
        guidance=Guidance(
            scale=sampling.guidance_scale,
            interval=tuple(sampling.guidance_interval),
            schedule=sampling.guidance_schedule,
            power=sampling.guidance_power,
            num_timesteps=diffusion.num_timesteps,
        ),
    )
    if not settings.is_guided or is_autoguided:
        return settings
    without = "loss.text_dropout" if has_text(config) else "loss.class_dropout"
    dropout = config.loss.text_dropout if has_text(config) else config.loss.class_dropout
    if not dropout:
        weaker = "images without a caption" if has_text(config) else "the null class"
        raise UserError(
            f"guidance_scale is {sampling.guidance_scale:g}, but the model is trained with"
            f" {without}=0 and does not know {weaker}; set guidance_scale to 1, or guide by a weaker"
            " checkpoint."
        )
    return settings


def sequence_length(config: ConfigDict, num_clean: int | None = None) -> int:
    """T, the tokens of one training sequence: condition, clean (by default the most), noised.

    Of documents, the tokens for which a row has room: text, and all clean and noised ones of images.
    """
    transformer = model(config)
    noised = config.diffusion.timesteps_per_ar_step * transformer.num_tokens
    if has_text(config):
        room = slots(config)
        return room.num_text + room.num_images * (transformer.num_tokens + noised)
    if num_clean is None:
        num_clean = max_clean_tokens(factorization(config), transformer.num_tokens)
    return transformer.condition_length + num_clean + noised


def training_forward_flops(config: ConfigDict, num_clean: int | None = None) -> int:
    """Model FLOPs of the forward pass over a global batch, by default with the most clean tokens."""
    transformer, diffusion = model(config), config.diffusion
    copies = diffusion.timesteps_per_ar_step
    is_shared = diffusion.timestep_sharing == "example"
    num_timesteps = copies if is_shared else copies * transformer.num_tokens
    if has_text(config):
        room = slots(config)
        of_row = flops.document_forward_flops(
            transformer, room.num_text, room.num_images, copies, num_timesteps
        )
        return config.train.global_batch_size * of_row
    if num_clean is None:
        num_clean = max_clean_tokens(factorization(config), transformer.num_tokens)
    return config.train.global_batch_size * flops.training_forward_flops(
        transformer, num_clean, copies, num_timesteps
    )
