"""Every field of a run of `cfjax.train_autoencoder` with its default: Stable Diffusion's KL-8.

The other configs of autoencoders start from this one and change what differs. Not run by itself: it
names no dataset.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """The defaults; one commented line a field, but for those that `configs/default.py` has."""
    shared = default.get_config()
    config = ConfigDict()
    config.seed = 0  # of initialization, data order and drawn latents

    config.data = shared.data
    for of_documents in ("scene_grid", "sequence_length", "num_examples", "image_to_text_share"):
        del config.data[of_documents]
    config.data.size = 256

    config.autoencoder = ConfigDict()
    config.autoencoder.channels = 128  # of the widest resolution
    config.autoencoder.channel_multipliers = (1, 2, 4, 4)  # a level each; all but one halve
    config.autoencoder.latent_channels = 4  # of the latents
    config.autoencoder.num_res_blocks = 2  # of a level of the encoder; the decoder has one more
    config.autoencoder.encoder_attention_levels = ()  # with attention, from 0, the widest
    config.autoencoder.decoder_attention_levels = ()  # the same of the decoder
    config.autoencoder.num_groups = 32  # of the norms; divides the channels of every level
    config.autoencoder.dtype = "float32"  # of its convolutions, at the highest precision

    config.loss = ConfigDict()
    config.loss.reconstruction = "l1"  # absolute error of pixel values, or "l2", squared
    config.loss.kl_weight = (
        1e-6  # of the KL divergence; more makes smoother latents, worse pictures
    )
    config.loss.perceptual_weight = 0.0  # of LPIPS; 0 for none
    config.loss.perceptual_path = ""  # the folder of LPIPS, which `cfjax.convert` writes

    config.optimizer = shared.optimizer
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 1_000
    config.optimizer.eps = 1e-8
    config.optimizer.ema_decay = 0.999

    config.train = ConfigDict()
    config.train.global_batch_size = 256  # examples over all devices
    config.train.num_train_steps = 250_000  # 50 epochs of ImageNet
    config.train.log_every = 100  # train steps between lines of the metric log
    config.train.checkpoint_every = 5_000  # train steps between checkpoints
    config.train.keep_checkpoints = 3  # how many of them stay
    config.train.keep_every = 0  # those of train steps that this divides stay too; 0 for none
    config.train.keep_best_metric = ""  # the one where this is lowest stays too; "" for none
    config.train.sample_every = 0  # train steps between reconstructions in TensorBoard; 0 for none

    return config
