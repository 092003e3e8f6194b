"""Sections that every config shares, and the smoke variant of any config."""

import ml_collections
from ml_collections import config_dict


def base() -> ml_collections.ConfigDict:
    """The shared sections with their defaults; None in a placeholder means: as the preset or the data set says."""
    config = ml_collections.ConfigDict()
    config.name = "unnamed"  # name of the run folder, runs/<name>
    config.method = "asbq"  # key in bnn_jax.methods.METHODS
    config.seed = 0  # seed of data order, augmentation, initial weights
    config.num_seeds = 1  # seeds trained side by side in one program on one accelerator: seed, seed + 1, ...
    config.network = "resnet20"  # key in bnn_jax.networks.NETWORKS

    config.extra_objectives = ()  # of 'feature_swap', 'label_bank', 'cluster': added to the method's own
    config.extra_objective_weights = ()  # one for each; empty: 1, 0.05, 0.01 as published
    config.extra_objectives_on = "last_stage"  # 'last_stage' | 'all_stages'

    config.data = ml_collections.ConfigDict()
    config.data.name = "cifar10"  # key in bnn_jax.data.SOURCES
    config.data.data_dir = config_dict.placeholder(str)  # folder of prepared data; None: TFDS_DATA_DIR or TFDS's own
    config.data.num_train = config_dict.placeholder(int)  # training images used; None: all
    config.data.num_eval = config_dict.placeholder(int)  # test images used; None: all
    config.data.validation_fraction = 0.0  # share of train held out to choose the best epoch; 0: chosen on the test set
    config.data.augment = "pad_crop_flip"  # one of bnn_jax.data.base.AUGMENTATIONS
    config.data.decoder = "pillow"  # of training images that are decoded while training: 'pillow' | 'opencv'
    config.data.workers = 0  # processes that read such images; 0: threads of this process
    config.data.normalize = True  # whether the channels are normalised; else pixels stay in [0, 1]
    config.data.lighting = "none"  # random change of light in training: 'none' | 'release' | 'paper'
    config.data.image_size = config_dict.placeholder(int)  # pixels, for generated or embedded images only
    config.data.num_classes = config_dict.placeholder(int)  # for generated images only

    config.train = ml_collections.ConfigDict()
    config.train.batch_size = 128  # images per optimiser step, over all devices
    config.train.eval_batch_size = 500  # images per evaluation call
    config.train.momentum = 0.9
    config.train.nesterov = True
    config.train.weight_decay = 1e-4  # L2, added to the gradient before momentum
    config.train.drop_last_batch = False  # whether the partial batch at the end of an epoch is left out
    config.train.compute_dtype = "float32"  # 'bfloat16': convolutions of integer codes run in bfloat16, exactly
    config.train.accumulation_steps = 1  # parts of a batch passed through the network in turn, where it does not fit
    config.train.remat = False  # whether blocks are computed again in the backward pass, to need less memory
    config.train.steps_per_dispatch = 0  # optimiser steps per call of the compiled program; 0: chosen by the device
    config.train.checkpoint_seconds = 300.0  # seconds between checkpoints inside an epoch
    return config


def asbq() -> ml_collections.ConfigDict:
    """The section of ASBQ: the five-rung chain; every empty switch is taken from the preset."""
    section = ml_collections.ConfigDict()
    section.preset = "paper"  # 'paper' | 'release' | 'checkpoint', see bnn_jax/methods/asbq.py
    section.bits = (32, 8, 4, 2, 1)  # bit width of each rung
    section.init_from = config_dict.placeholder(str)  # 'file:PATH', a checkpoint that the first rung starts from
    section.init_bits = 32  # bit width of the network in that file, which teaches the first rung
    section.epochs = (240,)  # per rung, or one for all
    section.learning_rates = (0.1, 0.1, 0.1, 0.01, 0.01)  # base rate per rung, or one for all
    section.learning_rate_boundaries = (80.0, 120.0, 180.0)  # epochs at which the factor changes
    section.learning_rate_factors = (1.0, 0.1, 0.01, 0.001)  # factors on the base rate
    section.schedule_epochs = config_dict.placeholder(int)  # length the boundaries are of, scaled to a rung; None: not
    section.block = config_dict.placeholder(str)  # 'release' | 'checkpoint' | 'imagenet'
    section.w1 = config_dict.placeholder(str)  # 1-bit weights: 'sign' (binary) | 'levels' (as released)
    section.prune_amount = 0.05  # share of filters (VGG-Small: 1x2 blocks) masked
    section.prune_apply = config_dict.placeholder(str)  # 'before_quant' | 'after_quant'
    section.prune_source = config_dict.placeholder(str)  # 'random_init' | 'copied_weights'
    section.mask_seed = 1000  # seed of the random masks of all rungs but the first
    section.init = config_dict.placeholder(str)  # quantized convolutions: 'uniform' | 'he_normal'
    section.copy_from = config_dict.placeholder(str)  # epoch of the previous rung that is copied: 'best' | 'last'
    section.kd_weight = config_dict.placeholder(float)  # share of distillation in the loss, 0 to 1
    section.kd_temperature = 5.0
    section.kd_reduction = config_dict.placeholder(str)  # 'batchmean' | 'mean' (over classes too)
    section.kd_factor = config_dict.placeholder(str)  # factor on the divergence: '1' | 'T2' | '2T2'
    return section


def skd() -> ml_collections.ConfigDict:
    """The section of SKD-BNN: a stage for each entry of ``epochs``, starting from the weights of the one before."""
    section = ml_collections.ConfigDict()
    section.preset = "paper"  # 'paper' | 'release', see bnn_jax/methods/skd.py
    section.distill = True  # False: IR-Net alone
    section.epochs = (700,)  # per stage
    section.learning_rates = (0.1,)  # per stage
    section.warmup_epochs = (8,)  # per stage
    section.final_learning_rate = 0.0  # what the cosine approaches
    section.optimizer = "sgd"  # 'sgd' | 'adam'
    section.feature_weight = 1.0  # alpha
    section.label_weight = 0.05  # beta
    section.cluster_weight = 0.01  # gamma
    section.temperature = 4.0  # of the label bank
    section.strict_release = config_dict.placeholder(bool)  # NaN bank rows for classes never right
    section.reset_bank = config_dict.placeholder(bool)  # clears the bank every epoch (MNIST release)
    section.task_loss = config_dict.placeholder(str)  # 'cross_entropy' | 'squared_hinge'
    section.hidden = config_dict.placeholder(int)  # units of the MLP's hidden layers
    section.dropout = 0.5  # of the MLP
    section.log_gradient_norms = False  # records the gradient norm of every loss term, at the cost of a pass for each
    return section


def weight_search() -> ml_collections.ConfigDict:
    """The section of Weight Search: one stage in a list of values, or one for each bit."""
    section = ml_collections.ConfigDict()
    section.preset = "paper"  # 'paper' | 'release', see bnn_jax/methods/weight_search.py
    section.values = config_dict.placeholder(object)
    section.values = "po2-2b"  # '1b' | 'po2-2b' | '-3b' | '-4b' | 'int-2b' | '-3b' | '-4b' | (-1.0, 0.0, ...) | 'fp32'
    section.by_bit = ()  # (0, 1, ...): signs first, then a halving for each further bit; values are not used then
    section.epochs = (200,)  # per stage, or one for all
    section.learning_rate = 0.1  # at the start
    section.schedule_unit = config_dict.placeholder(str)  # how often the cosine moves: 'epoch' | 'step'
    section.learning_rate_boundaries = ()  # epochs at which the rate is multiplied instead of following a cosine
    section.learning_rate_factor = 0.1  # what it is multiplied with
    section.temperature = 1.0  # of the choices, at the start
    section.temperature_rate = 0.97  # factor on it
    section.temperature_interval = 1  # epochs between two such factors
    section.temperature_floor = 1e-5  # smallest temperature
    section.soft = False  # trains with the expected weight instead of the chosen one
    section.noise = 0.0  # factor on Gumbel noise in training; 0: nothing is drawn
    section.noise_rate = 1.0  # factor on it
    section.noise_interval = 1  # epochs between two such factors
    section.quantize_first = False  # whether the first convolution is searched too
    section.quantize_last = False  # whether the classifier is searched too
    section.logit_weight_decay = config_dict.placeholder(float)  # of the logits alone; None: config.train.weight_decay
    section.activations = "identity"  # key in bnn_jax.quantizers.ACT
    section.activation_bits = 1  # for 'dorefa'
    return section


def snn() -> ml_collections.ConfigDict:
    """The section of SNN: a teacher, binary activations, then sub-bit weights; empty switches are the preset's."""
    section = ml_collections.ConfigDict()
    section.preset = "paper"  # 'paper' | 'release_1gpu' | 'release_4gpu', see bnn_jax/methods/snn.py
    section.tau = 5  # bits of an index; codebooks have 2**tau patterns, a weight tau/9 bits; 9: ordinary binary weights
    section.two_step = True  # False: sub-bit weights from scratch, without the step of binary activations
    section.epochs = (256,)  # per step, or one for both
    section.learning_rate = 1e-3  # of Adam at the start, falling linearly to 0
    section.weight_decays = (1e-5, 0.0)  # per step, or one for both
    section.refine = config_dict.placeholder(bool)  # whether codebooks are trained
    section.refine_interval = 25  # steps from one gradient of the codebooks to the next
    section.maintenance = config_dict.placeholder(str)  # rows of new patterns: 'clean' | 'release'
    section.pattern_optimizer = config_dict.placeholder(str)  # Adam between those steps: 'release14' (goes on) | 'skip'
    section.teacher = "stage"  # 'stage': trained first | 'file:PATH', a checkpoint of teacher_network
    section.teacher_network = "standard_resnet20"  # key in bnn_jax.networks.NETWORKS
    section.teacher_epochs = 200  # config.train has its momentum and weight decay
    section.teacher_learning_rate = 0.1  # at the start, falling to 0 by a cosine
    return section


def basq() -> ml_collections.ConfigDict:
    """The section of BASQ: supernet in two phases, search on folds, fine-tuning; empty switches are the preset's."""
    section = ml_collections.ConfigDict()
    section.preset = "release"  # 'release' | 'held_out', see bnn_jax/methods/basq.py
    section.bits = 2  # of weights and activations; 2-bit weights are ternary
    section.branch_decays = (1e-2, 5e-3, 1e-3, 5e-4, 1e-4, 5e-5, 1e-5)  # L2 of the clip values, one per branch
    section.epochs = (280,)  # per phase of the supernet, or one for both
    section.learning_rate = 3.75e-4  # of Adam at the start, falling to 0 by a cosine over the steps
    section.schedule_steps = config_dict.placeholder(int)  # steps of the cosine; None: those of the phase
    section.weight_decay = 5e-6  # L2 of the convolutions
    section.gradient_clip_norm = 10.0
    section.unselected = "decay"  # branches a step has not chosen: 'decay' (gradient 0) | 'freeze' (left alone)
    section.folds = 10
    section.fold_kind = config_dict.placeholder(str)  # 'contiguous' (by class) | 'stratified'
    section.fold_batch = 200  # images in a batch of contiguous folds
    section.search_on = config_dict.placeholder(str)  # 'test' | 'validation' (held out from training)
    section.one_random_stream = config_dict.placeholder(bool)  # through all folds; else each fold has a seed
    section.report_epoch = config_dict.placeholder(str)  # of the fine-tuning: 'best' | 'last'
    section.population = 45  # paths in a generation
    section.mutations = 15  # of them
    section.crossovers = 15  # of them
    section.parents = 10  # best paths so far
    section.generations = 20  # after the first, random one
    section.mutation_probability = 0.1  # of each gene
    section.paths_at_once = 0  # evaluated side by side; 0: chosen by the device
    section.finetune_epochs = 3
    section.finetune_learning_rate = 7.5e-6
    section.teacher = "stage"  # 'stage': trained first | 'file:PATH', a checkpoint of teacher_network
    section.teacher_network = "standard_resnet18_cifar"  # key in bnn_jax.networks.NETWORKS
    section.teacher_epochs = 200  # config.train has its momentum and weight decay
    section.teacher_learning_rate = 0.1  # at the start, falling to 0 by a cosine
    return section


SMOKE = ("smoke", "smoke_real")


def imagenet(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """ImageNet as published programs see it: random resized crops of 224 pixels, the centre of 256 in evaluation."""
    config.data.name = (
        "imagenet2012"  # 'imagenet2012_resized' reads what `python -m bnn_jax.data.prepare imagenet` wrote
    )
    config.data.augment = "random_resized_crop_flip"
    return config


def smoke(config: ml_collections.ConfigDict, *, image_size: int, num_classes: int) -> ml_collections.ConfigDict:
    """Two steps per epoch on generated images of the real size: shows that a config runs, needs no data set."""
    smoke_real(config)
    config.name = config.name.removesuffix("_real")
    config.data.name = "synthetic"
    config.data.image_size = image_size
    config.data.num_classes = num_classes
    if config.data.augment == "random_resized_crop_flip":
        config.data.augment = "pad_crop_flip"  # generated images lie in memory
    return config


def smoke_real(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Two steps per epoch on the first images of the config's own data set."""
    config.name = f"{config.name}_smoke_real"
    config.data.num_train = 16
    config.data.num_eval = 8
    config.train.batch_size = 8
    config.train.eval_batch_size = 8
    return config


def variant(config: ml_collections.ConfigDict, argument: str, **smoke_options: int) -> ml_collections.ConfigDict:
    """The config for what stands behind the colon of ``--config=FILE:ARGUMENT``: nothing, or one of ``SMOKE``.

    Raises:
      ValueError: another argument.
    """
    if argument not in ("", *SMOKE):
        raise ValueError(f"--config=...:{argument}: accepted behind the colon is 'smoke' or 'smoke_real'")
    if argument == "smoke_real":
        return smoke_real(config)
    return smoke(config, **smoke_options) if argument == "smoke" else config


def snn_variant(config: ml_collections.ConfigDict, argument: str, **smoke_options: int) -> ml_collections.ConfigDict:
    """``variant`` of an SNN config; the smoke form trains a teacher of its own and refines every second step.

    Raises:
      ValueError: another argument.
    """
    config = variant(config, argument, **smoke_options)
    if argument in SMOKE:
        config.snn.teacher = "stage"
        config.snn.teacher_epochs = 1
        config.snn.epochs = (2,)  # the learning rate of the last epoch is 0
        config.snn.refine_interval = 2
    return config


def basq_variant(config: ml_collections.ConfigDict, argument: str, **smoke_options: int) -> ml_collections.ConfigDict:
    """``variant`` of a BASQ config; the smoke form trains a teacher of its own and searches two folds for a moment.

    Raises:
      ValueError: another argument.
    """
    config = variant(config, argument, **smoke_options)
    if argument in SMOKE:
        # Where the search looks at images held out, 4 of 20 are: two batches of 8 are left.
        config.data.num_train = 20 if config.data.validation_fraction else 16
        config.data.validation_fraction = 0.2 if config.data.validation_fraction else 0.0
        config.basq.teacher = "stage"
        config.basq.teacher_epochs = 1
        config.basq.epochs = (1,)
        config.basq.schedule_steps = None
        config.basq.folds = 2
        config.basq.fold_batch = 4
        config.basq.population, config.basq.mutations, config.basq.crossovers = 4, 1, 1
        config.basq.parents, config.basq.generations = 2, 1
        config.basq.finetune_epochs = 1
    return config
