"""Every field of a run with its default: CausalFusion's published recipe.

The other configs start from this one and change what differs. Not run by itself: it names no
dataset.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The defaults; one commented line a field."""
    config = ConfigDict()
    config.seed = 0  # of initialization, data order, noise, splits and orders

    config.data = ConfigDict()
    config.data.name = ""  # "mnist", "image_folder", "array_record", "tfds", "latents" (encoded); with text "scenes", "progressions", "transforms" (embedded), "captioned_array_record", "captioned_tfds"
    config.data.path = ""  # the folder of all but the embedded ones; of "tfds" its data_dir
    config.data.tfds_name = ""  # of the set of "tfds": "imagenet2012", "coco_captions"
    config.data.size = 32  # height and width of what the model sees: pixels, or latents
    config.data.channels = 3  # of what the model sees
    config.data.num_classes = 1000  # label num_classes is the null class
    config.data.horizontal_flip = True  # mirror each example with probability 1/2
    config.data.on_corrupt = "refuse"  # what is damaged: "refuse", or "skip" and name it
    config.data.num_threads = 4  # that read and decode ahead of training
    config.data.scene_grid = 2  # cells along each side of "scenes", 2 or 3
    config.data.sequence_length = 10  # images of one of the "progressions"
    config.data.num_examples = 2  # pairs before the query of "transforms"
    config.data.image_to_text_share = 0.5  # of captioned images that come before their caption

    config.text = ConfigDict()  # of models of documents
    config.text.tokenizer = ""  # "bytes", "scene_words", or path of a tokenizers .json or a SentencePiece .model; empty for images alone
    config.text.checksum = ""  # of that file; empty takes it as it is and saves what it was
    config.text.max_length = 64  # of one text, in tokens
    config.text.tokens_per_row = 256  # text tokens for which a row has room
    config.text.images_per_row = 4  # images for which a row has room
    config.text.tied_head = True  # the head multiplies by the text embedding

    config.autoencoder = ConfigDict()  # of models that see latents
    config.autoencoder.path = ""  # folder of one; images are encoded in training, but for "latents"
    config.autoencoder.scale = 0.0  # by which its latents are multiplied; 0 takes what it names
    config.autoencoder.dtype = "float32"  # of its convolutions, at the highest precision

    config.model = ConfigDict()
    config.model.width = 1024  # D
    config.model.depth = 24  # layers
    config.model.num_heads = 16  # attention heads
    config.model.mlp_ratio = 4.0  # hidden width of the MLP over D
    config.model.patch_size = 1  # p; a token is p x p pixels or latents
    config.model.num_condition_tokens = 64  # learned condition tokens a class
    config.model.condition_repeats = 1  # how often those are repeated (paper Table 8)
    config.model.position_embedding = "learned"  # or "sincos" (frozen)
    config.model.position_scale = 1.0  # times sin-cos, where learned positions start
    config.model.dtype = "bfloat16"  # of matrix products; all else is float32
    config.model.gradient_dtype = "float32"  # in which devices add up the weights' gradients
    config.model.remat_policy = "dots"  # what the backward pass recomputes: "none", "dots", "full"
    config.model.attention = "fused"  # or "split" (faster on CPUs), "splash" (a TPU kernel)
    config.model.scan_layers = True  # compile one layer and loop over it

    config.factorization = ConfigDict()
    config.factorization.mode = "decayed"  # "diffusion", "ar", "fixed", "random" or "decayed"
    config.factorization.num_ar_steps = 1  # S of mode "fixed"
    config.factorization.ar_step_decay = 0.9  # γ of mode "decayed": p(S) ∝ γ^(S-1)
    config.factorization.split_per_example = False  # another split for each example of a batch
    config.factorization.token_order = "random"  # or "raster", "block_raster", "dilated"
    config.factorization.block_size = 4  # of "block_raster", in tokens
    config.factorization.dilation_stride = 2  # of "dilated", in tokens

    config.diffusion = ConfigDict()
    config.diffusion.noise_schedule = "linear"  # or "cosine"
    config.diffusion.num_timesteps = 1000  # T
    config.diffusion.prediction_type = "noise"  # or "x_start", "velocity"
    config.diffusion.timestep_sharing = "example"  # one t an "example", or one an "ar_step"
    config.diffusion.timesteps_per_ar_step = 1  # k noised copies, each with its own t (Table 7)

    config.loss = ConfigDict()
    config.loss.ar_loss_weight = 2.0  # λ at the first position, falling to 1; 1 for none
    config.loss.ar_loss_weight_schedule = "linear"  # or "cosine"
    config.loss.noise_level_weighting = "none"  # or "min_snr", "p2", "truncated_snr"
    config.loss.noise_level_gamma = 5.0  # γ of "min_snr" and "p2"
    config.loss.class_dropout = 0.1  # share of examples trained without their class, for guidance
    config.loss.text_loss_weight = 0.2  # of the cross-entropy of text against the diffusion loss
    config.loss.text_dropout = 0.1  # share of captions before images left out, for guidance

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 8e-4  # after warm-up
    config.optimizer.schedule = "constant"  # after warm-up, or "cosine" to 0
    config.optimizer.warmup_steps = 25_000  # train steps of linear warm-up from 0
    config.optimizer.b1 = 0.9  # AdamW's first-moment decay
    config.optimizer.b2 = 0.95  # AdamW's second-moment decay
    config.optimizer.eps = 1e-15  # AdamW's ε, as published
    config.optimizer.weight_decay = 0.0  # AdamW's
    config.optimizer.max_grad_norm = 1.0  # gradients are clipped to this global norm
    config.optimizer.ema_decay = 0.9999  # of the averaged parameters that sampling uses

    config.train = ConfigDict()
    config.train.global_batch_size = 2048  # examples over all devices
    config.train.num_microbatches = 1  # parts of a batch taken one after the other, for memory
    config.train.clean_length_buckets = 1  # programs for splits that need fewer clean tokens
    config.train.tpu_compiler_options = ()  # of XLA for TPUs: "NAME=VALUE", ...
    config.train.num_train_steps = 500_000  # 800 epochs of ImageNet
    config.train.log_every = 100  # train steps between lines of the metric log
    config.train.checkpoint_every = 5_000  # train steps between checkpoints
    config.train.keep_checkpoints = 3  # how many of them stay
    config.train.keep_every = 0  # those of train steps that this divides stay too; 0 for none
    config.train.keep_best_metric = (
        ""  # the one where this is lowest stays too: "loss", "fid"; "" for none
    )
    config.train.sample_every = 0  # train steps between sample grids in TensorBoard; 0 for none

    config.evaluation = ConfigDict()  # of the EMA weights during training
    config.evaluation.every = 0  # train steps between evaluations; 0 for none
    config.evaluation.num_samples = 1000  # N of FID-N, sampled as config.sampling says
    config.evaluation.inception_weights = ""  # of the ADM suite; else a classifier is trained
    config.evaluation.reference = ""  # .npz or folder to compare with; else the training images

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices along data; -1 takes what the others leave
    config.mesh.fsdp = 1  # devices over which parameters and optimizer state are split
    config.mesh.tensor = 1  # devices over which heads and MLP are split
    config.mesh.min_split_size = 0  # parameters of fewer values are not split over fsdp

    config.sampling = ConfigDict()  # what `cfjax.sample` does unless its flags say otherwise
    config.sampling.num_ar_steps = 1  # S
    config.sampling.split = "equal"  # sizes of the AR steps, or "cosine": few tokens first
    config.sampling.token_order = "random"  # or "raster", "block_raster", "dilated"
    config.sampling.denoising_steps = "250"  # of each AR step: "250", "ddim50", sections "10,15,20", or by AR step "50/20", "50:10"
    config.sampling.timestep_spacing = "linear"  # or "quadratic", "karras", "logsnr"
    config.sampling.solver = "ddpm"  # or "ddim", "dpmpp_2m", "dpmpp_2m_sde"
    config.sampling.variance = "fixed_large"  # of "ddpm", or "fixed_small"
    config.sampling.eta = 0.0  # of "ddim": share of ancestral noise
    config.sampling.temperature = 1.0  # by which the noise is multiplied that solvers add
    config.sampling.clip_x_start = False  # clip predicted x_0 to [-1, 1], for pixels
    config.sampling.dynamic_threshold = 0.0  # or scale it to its quantile, such as 0.995
    config.sampling.guidance_scale = 1.0  # classifier-free guidance; 1 for none
    config.sampling.guidance_interval = (0, 1000)  # guided where low <= t < high
    config.sampling.guidance_schedule = "constant"  # or "linear", "cosine" over the AR position
    config.sampling.guidance_power = 0.0  # scale - 1 falls by (1 - t / T)^power; 0 for none
    config.sampling.dtype = ""  # of generation: "bfloat16", "float32"; empty as in training
    config.sampling.images_per_device = 64  # at a time; others make other bytes by rounding

    return config
