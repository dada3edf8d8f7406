"""Every setting: its name, type, bounds, default and description, in the sections of a settings file."""

from itertools import accumulate
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from fedjets_flwr.names import ROLES

Scalar = str | int | float | bool
MOST_PARTS = 4096
"""Layers of a language model, and experts of all its layers."""


def kebab(name: str) -> str:
    """Return the TOML spelling of a Python name."""
    return name.replace("_", "-")


class Section(BaseModel):
    """A group of settings: immutable, no unknown keys, kebab-case outside."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, alias_generator=kebab, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _writable(cls, value: object) -> object:
        """Refuse text that no file can hold or be named by."""
        if isinstance(value, str) and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
            raise PydanticCustomError("text", "give text without NUL and broken characters")
        return value


class Run(Section):
    name: str = Field(
        "", description="folder of the run below output-dir; empty: made from the settings, numbered if taken"
    )
    output_dir: str = Field("", description="where runs are written; empty: `runs/` in the caller's folder")
    cache_dir: str = Field("", description="embeddings, common experts; empty: `$FEDJETS_CACHE` or `~/.cache/fedjets`")
    start_from: str = Field(
        "",
        description="folder of a finished run whose common expert and models this one starts from; where that one has a"
        " single model, all experts do",
    )
    rounds: int = Field(
        40,
        ge=0,
        le=999_999,
        description="federated rounds (T); 0: only score, the models of start-from or a pretrained language model",
    )
    evaluate_every: int = Field(5, ge=1, le=1_000_000, description="rounds between evaluations on the unseen clients")
    inspect_every: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="rounds between measurements of every expert on every class; 0: after the last round only",
    )
    checkpoint_every: int = Field(
        10, ge=1, le=1_000_000, description="rounds between checkpoints (the last round always has one)"
    )
    keep_checkpoints: int = Field(2, ge=1, le=1_000_000, description="checkpoints kept besides the best one")
    seed: int = Field(1, ge=0, le=2**63 - 1, description="root of every random draw")
    resume: bool = Field(False, description="go on from the newest good checkpoint of this run")
    overwrite: bool = Field(
        False, description="replace the results that the run's folder holds, once there is a checkpoint of this run"
    )
    threads_per_client: int = Field(1, ge=1, le=1024, description="torch threads of a client's process")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where clients compute and the common expert is trained; auto: the GPU if there is one"
    )
    tensorboard: bool = Field(False, description="also write TensorBoard events (extra `tensorboard`)")


DataName = Literal["digits", "cifar10", "cifar100", "image-folder", "text", "text-folder", "tasks", "task-folder"]
OWN_DATA = ("image-folder", "text-folder", "task-folder")
"""Of ``data.name``, whose ``data.dir`` says which data it is; a published data set is the same wherever it lies."""


class Data(Section):
    name: DataName = Field(
        "digits",
        description="data set; image-folder: each site's own, at the `data-path` of its `--node-config`; text: what"
        " `fedjets text` fetches; text-folder: text of your own; tasks: text to write for that text; task-folder: for"
        " your own",
    )
    dir: str = Field(
        "",
        description="folder of the data set (image-folder: of shared images in `train/` and `test/`; text-folder: of a"
        " folder or file for each domain; task-folder: of a file for each); empty: `$FEDJETS_DATA` or"
        " `~/.cache/fedjets/data`",
    )
    classes: str = Field("", description="image-folder: names of the class folders, with commas between them")
    channels: Literal[1, 3] = Field(3, description="image-folder: 3 for colour, 1 for grey; images are converted")
    size: int = Field(
        32, ge=8, le=1024, description="image-folder: height and width to which images are resized, in pixels"
    )
    download: bool = Field(True, description="download a missing data set")
    augment: Literal["none", "crop-flip", "crop"] = Field(
        "none", description="training augmentation, drawn per image; only whole experts (`moe.trainable = all`) see it"
    )


class Text(Section):
    domains: str = Field(
        "code,scripture,glosses,manual,slang",
        description="kinds of text, comma between, which clients hold in turn: of code, docstrings, scripture, glosses,"
        " manual, slang; of a text-folder the names of its folders of .txt files, or of its files of JSON lines; tasks:"
        " of glosses, scripture, code; of a task-folder the names of its files of JSON lines",
    )
    public_domains: str = Field(
        "",
        description="of text.domains those whose public part tokens are learnt from and models are pretrained on, comma"
        " between; clients hold all; empty: all",
    )
    tokens: Literal["bpe", "bytes"] = Field(
        "bpe", description="what a model reads: byte pairs that are learnt from the public text, or bytes"
    )
    vocabulary: int = Field(2048, ge=257, le=65_536, description="different tokens (bpe)")
    train_tokens: int = Field(20_000, ge=1, le=2**31, description="tokens that a client trains on")
    val_tokens: int = Field(4_000, ge=1, le=2**31, description="tokens that a client chooses by")
    test_tokens: int = Field(10_000, ge=1, le=2**31, description="tokens that score a client")
    train_pairs: int = Field(350, ge=1, le=10_000_000, description="tasks: inputs with targets that a client trains on")
    val_pairs: int = Field(60, ge=1, le=10_000_000, description="tasks: those that a client chooses by")
    test_pairs: int = Field(80, ge=1, le=10_000_000, description="tasks: those that score a client")
    target_tokens: int = Field(
        24, ge=1, le=65_536, description="tasks: tokens that a model writes at most; longer targets are cut"
    )
    scores: str = Field(
        "",
        description="task-folder: how what is written is scored, comma between, in the order of the domains: accuracy,"
        " f1 (of words, as SQuAD, and exact match) or rouge-2",
    )


class Partition(Section):
    name: Literal["quantity", "label-groups", "dirichlet", "majority", "domains"] = Field(
        "label-groups", description="how data is split: by labels, or by how images look"
    )
    clients: int = Field(20, ge=1, le=100_000, description="training clients S, anchors included")
    unseen_clients: int = Field(5, ge=1, le=100_000, description="clients that never train (U)")
    validation_clients: int = Field(
        0,
        ge=0,
        le=100_000,
        description="clients that never train, for choosing settings: rounds are scored on them, with labels or domains"
        " of their own and public images that trained nobody, and the unseen clients once, after the last; 0: none",
    )
    anchors: int = Field(0, ge=0, le=100_000, description="anchor clients; 0: as many as moe.experts")
    labels_per_client: int = Field(
        4,
        ge=1,
        le=100_000,
        description="labels k of a normal or unseen client (not for dirichlet)",
    )
    samples_per_client: int = Field(
        100, ge=0, le=10_000_000, description="samples of a training client; 0: its share of each label"
    )
    unseen_samples: int = Field(
        0, ge=0, le=10_000_000, description="samples of an unseen client; 0: all test images of its labels"
    )
    alpha: float = Field(0.1, gt=0, description="concentration of the Dirichlet split")
    majority_share: float = Field(
        0.6,
        ge=0,
        le=1,
        description="share of a client's samples that are of its two majority classes (majority split); 2 / C is alike",
    )
    pairs: Literal["distinct", "exclusive", "code"] = Field(
        "distinct",
        description="majority classes of clients: all pairs in turn; no class in two clients; or as the code of Listo"
        " Zec et al. has it, equal classes among them",
    )
    opt_out: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the training clients that take no part in rounds (they still adapt); others may hold the"
        " same samples, but in the majority split",
    )
    private_share: float = Field(
        0.0, ge=0, lt=1, description="share of a training client's samples that only its own models are trained on"
    )
    domains: str = Field(
        "as-is,rotate-90,negative,noise=0.157,blur=1.6",
        description="of the domains split, comma between: as-is, rotate-90, rotate-180, rotate-270, negative, grey, or"
        " noise, blur, contrast, jpeg with :1 to :5 for a severity of CIFAR-10-C or =STRENGTH; of an image-folder the"
        " names of its folders, domain/class/",
    )
    unseen_domains: int = Field(
        1, ge=1, le=100, description="domains that an unseen client's images are of, in turn (domains split)"
    )
    held_out_domain: str = Field(
        "",
        description="one of the domains, which all unseen clients hold and no client trains on; as-is, where domains"
        " are made of images, is what the common expert was trained on; empty: none",
    )
    public_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the training samples that no client holds: the common expert is trained on them alone"
        " (a fifth of them stops that training), and the server may judge updates by them; 0: it is trained on the"
        " clients' samples and stopped by the test split; 1: all clients are elsewhere; of text 0, or 1 where every"
        " site has text of its own",
    )
    val_share: float = Field(
        0.0, ge=0, lt=1, description="share of a training client's samples that stops its own adaptation"
    )
    test_share: float = Field(
        0.0, ge=0, lt=1, description="share of a training client's samples that scores it; 0: only unseen clients are"
    )

    @property
    def all_clients(self) -> int:
        """How many clients there are; their ids count from 0."""
        return self.clients + self.unseen_clients + self.validation_clients

    def role_of(self, client: int) -> str:
        """Return which of ``names.ROLES`` a client has."""
        ends = accumulate((self.clients, self.unseen_clients))
        return ROLES[sum(client >= end for end in ends)]

    def place_of(self, client: int) -> int:
        """Return which client of its role a client is, from 0 on."""
        starts = accumulate((0, self.clients, self.unseen_clients))
        return client - max(start for start in starts if start <= client)


class Model(Section):
    name: Literal["cnn", "lenet", "resnet8", "resnet20", "resnet32", "resnet56", "resnet18", "resnet34"] = Field(
        "cnn", description="architecture of the experts and of a common expert trained here"
    )
    width: int = Field(16, ge=1, le=1024, description="channels of the first stage (cnn, resnet8 to resnet56)")
    norm: Literal["batch", "group"] = Field("batch", description="normalisation layers")
    stem: Literal["cifar", "imagenet"] = Field("cifar", description="first layers of resnet18 and resnet34")


class LanguageModel(Section):
    context: int = Field(64, ge=1, le=65_536, description="tokens that it sees at once (T)")
    width: int = Field(64, ge=1, le=65_536, description="numbers that stand for a token")
    heads: int = Field(4, ge=1, le=1024, description="heads of attention; they divide the width")
    layers: int = Field(4, ge=1, le=1024, description="layers")
    switch_layers: int = Field(
        2, ge=1, le=1024, description="the last so many layers have experts, of which each token goes to one (L)"
    )
    experts: int = Field(16, ge=1, le=1024, description="experts of each of those layers (E); 1: a dense model")
    hidden: int = Field(256, ge=1, le=65_536, description="units of an expert, and of a layer without experts")
    balance: float = Field(1e-3, ge=0, description="weight of the loss by which all experts get tokens, in training")
    pretrain_steps: int = Field(
        1500, ge=0, le=10_000_000, description="steps of its training on the public text; 0: it begins at random"
    )
    pretrain_batch: int = Field(40, ge=1, le=1_000_000, description="texts of `context` tokens in each of those steps")
    pretrain_lr: float = Field(2e-3, gt=0, description="peak rate of that training (AdamW, half a cosine)")


class CommonExpert(Section):
    path: str = Field(
        "",
        description="safetensors file of the common expert, or of the language model that a run on text starts from;"
        " empty: train one and cache it",
    )
    embedding: Literal["penultimate", "logits"] = Field("penultimate", description="what the gate reads")
    seed: int = Field(
        1,
        ge=0,
        le=2**63 - 1,
        description="root of the draws of its training and of the public samples; run.seed has no say there",
    )
    target_accuracy: float = Field(
        0.75,
        gt=0,
        le=1,
        description="training stops when held-out samples cross it: public ones, or without any the test split",
    )
    max_epochs: int = Field(
        60, ge=0, le=100_000, description="upper limit of that training; 0: none, and what begins with it is random"
    )
    lr: float = Field(0.1, gt=0, description="its peak learning rate (one cycle, Nesterov momentum 0.9)")
    batch_size: int = Field(128, ge=1, le=1_000_000, description="its batch size")
    weight_decay: float = Field(5e-4, ge=0, description="its weight decay")
    checks_per_epoch: int = Field(2, ge=1, le=10_000, description="looks at the held-out samples per epoch")


class Strategy(Section):
    name: str = Field("fedjets", description="method: one of the files of `strategies/`")


class Moe(Section):
    experts: int = Field(5, ge=1, le=10_000, description="experts M")
    top_k: int = Field(2, ge=1, le=10_000, description="experts that a client receives (K)")
    trainable: Literal["all", "stage", "head"] = Field(
        "all", description="what an expert is: a whole model, or a tail over the common expert's frozen trunk"
    )
    init: Literal["random", "common"] = Field("random", description="experts start at random or from the common expert")
    mix: Literal["", "logits", "probs"] = Field(
        "", description="what the gate weights in a normal client's loss; empty: the method's own way"
    )
    renormalise: bool = Field(False, description="gate weights of the K experts sum to one in that loss")


class Gate(Section):
    mode: Literal["learned", "random", "oracle"] = Field(
        "learned", description="random: frozen at its start; oracle: reads labels, and so tells part of the label"
    )
    hidden: int = Field(128, ge=1, le=65_536, description="hidden units of the gate")
    lr: float = Field(0.5, ge=0, description="learning rate of the gate (plain SGD)")
    learns_from: Literal["all", "anchors"] = Field(
        "all",
        description="who trains a learned gate: all clients of a round, as in the paper, or its anchors alone, so that"
        " no wrong route can confirm itself",
    )

    def trained_by(self, anchor: bool) -> bool:
        """Return whether a client of a round trains the gate, an anchor or another."""
        return self.mode == "learned" and (anchor or self.learns_from == "all")


class Train(Section):
    lr: float = Field(0.05, gt=0, description="learning rate of the experts")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of the experts, reset in every round")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of the experts")
    batch_size: int = Field(32, ge=1, le=1_000_000, description="batch size")
    local_epochs: int = Field(1, ge=1, le=100_000, description="local epochs of a round")
    local_steps: int = Field(
        0, ge=0, le=10_000_000, description="local steps of a round; 0: as many as local-epochs make"
    )
    optimizer: Literal["sgd", "adam"] = Field(
        "sgd",
        description="what trains experts in a round; adam begins anew in every round, without momentum's settings",
    )
    logit_adjust: bool = Field(
        False, description="cross entropy of logits + log local label shares: experts learn no local prior"
    )
    schedule: Literal["constant", "cosine"] = Field("constant", description="rates over the rounds")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="in which clients compute experts' outputs and gradients in rounds (autocast); weights, losses and"
        " averages stay float32",
    )


class Fedprox(Section):
    mu: float = Field(0.01, ge=0, description="weight of the proximal term (FedProx)")


class Scaffold(Section):
    option: Literal["I", "II"] = Field(
        "II", description="client variates: I full gradient at x, II from the local steps"
    )


class Fedmix(Section):
    weighting: Literal["samples", "responsibility"] = Field(
        "responsibility", description="weights of an expert's average (FedMix): samples, or samples x gate mass"
    )


class Ensembles(Section):
    members: int = Field(2, ge=1, le=10_000, description="independent FedAvg models whose probabilities are averaged")


class Cohort(Section):
    anchors: int = Field(5, ge=0, le=100_000, description="anchor clients of a round")
    normals: int = Field(5, ge=0, le=100_000, description="normal clients of a round")
    anchor_selection: Literal["partition", "k-means", "farthest"] = Field(
        "partition", description="anchors: the partition's (clients 0 to M-1), or chosen by clients' mean embeddings"
    )
    sampling: Literal["", "anchored", "uniform", "one-per-domain"] = Field(
        "",
        description="anchored: so many of each; uniform: anchors + normals from all; one-per-domain: of text, a client"
        " of each domain, whatever anchors and normals are; empty: the method's own way",
    )


class Aggregation(Section):
    weighting: Literal["samples", "equal"] = Field("samples", description="weights of the average")
    max_weight: float = Field(
        10.0, ge=0, description="a client's weight counts as this many times the clients' median at most; 0: as it is"
    )
    rule: Literal["mean", "clip", "median", "trimmed-mean", "krum", "validated"] = Field(
        "mean",
        description="how each vector's updates are combined; all but mean weigh clients the same; where too few clients"
        " hold a vector: clip; validated: clip, of replies whose experts do well on the server's public samples",
    )
    bn: Literal["mean", "pooled"] = Field(
        "mean",
        description="batch-norm variances: their mean, or the variance of all clients' samples together (adds that of"
        " the clients' means)",
    )
    clip_norm: float = Field(
        0.0, ge=0, description="bound of an update's norm for clip; 0: clip-times the median over the round's experts"
    )
    clip_times: float = Field(
        2.0, gt=0, description="bound of an update's norm for clip, in medians; 1 holds honest updates back"
    )
    tolerance: float = Field(
        0.05, ge=0, description="share by which an expert's loss may lie above the common expert's for validated"
    )
    gate_steps: int = Field(
        50, ge=0, le=100_000, description="steps by which validated trains the round's gate on the public samples"
    )
    root_samples: int = Field(1000, ge=1, le=10_000_000, description="public samples at most by which validated judges")
    trim: float = Field(0.2, gt=0, lt=0.5, description="share cut off at both ends by trimmed-mean")
    byzantine: int = Field(
        1, ge=1, le=100_000, description="bad clients that krum allows for; it needs 2 f + 3 clients"
    )


class Privacy(Section):
    noise_multiplier: float = Field(0.0, ge=0, description="Gaussian noise on clipped updates (z); 0: off")
    clip_norm: float = Field(1.0, gt=0, description="bound of the norm of a client's update of one vector (C)")
    delta: float = Field(1e-3, gt=0, lt=1, description="delta at which epsilon is told; below 1 / clients")
    route_epsilon: float = Field(0.0, ge=0, le=50, description="randomised response on uploaded expert ids; 0: off")


class Attack(Section):
    kind: Literal[
        "none",
        "sign-flip",
        "gaussian",
        "label-flip",
        "replacement",
        "adaptive",
        "ruined-statistics",
        "forged-counts",
    ] = Field("none", description="what simulated attackers answer, to measure aggregation.rule")
    share: float = Field(
        0.0, ge=0, le=1, description="share of the training clients that attack, and of the anchors at least"
    )


class Limits(Section):
    exchange_seconds: float = Field(3600, gt=0, le=10_000_000, description="deadline of one exchange with the clients")
    node_seconds: float = Field(120, gt=0, le=10_000_000, description="how long to wait for SuperNodes at the start")
    enough_share: float = Field(
        1.0, gt=0, le=1, description="share of an exchange's SuperNodes whose good answers are enough; 1: wait for all"
    )
    grace_seconds: float = Field(
        30, ge=0, le=10_000_000, description="how long the others are then waited for, before all goes on"
    )
    lock_seconds: float = Field(
        30, ge=0, le=10_000_000, description="how long to wait for a killed run to let go of the run folder"
    )
    min_replies: int = Field(
        1, ge=1, le=100_000, description="good answers below which a round leaves all weights as they were"
    )
    min_replies_per_expert: int = Field(1, ge=1, le=100_000, description="the same for each vector by itself")
    max_update_norm: float = Field(0.0, ge=0, description="updates of a larger norm are refused; 0: no bound")
    max_growth: float = Field(
        1000.0, ge=0, description="a vector that becomes this many times longer in a round is refused; 0: never"
    )
    max_samples: int = Field(
        10_000_000,
        ge=1,
        le=1_000_000_000_000,
        description="samples of a client above which it is refused; a simulation knows its number",
    )
    max_failure_share: float = Field(0.5, ge=0, le=1, description="a run stops when more of a round's clients failed")


class Nodes(Section):
    roster: str = Field(
        "",
        description="file on the server's machine that binds each site's public key to its client id, from"
        " fedjets credentials; empty: the key that first claims a client keeps it for the run and its resumes",
    )


class Transport(Section):
    name: Literal["auto", "inline", "shared"] = Field(
        "auto", description="how vectors travel: in the message, by shared memory on one machine, or what fits"
    )
    dtype: Literal["float32", "float16"] = Field(
        "float32", description="numbers on the wire; float16 halves the bytes and rounds what travels"
    )


class Participants(Section):
    clients: int = Field(
        0, ge=0, le=100_000, description="training clients that are scored on their own test part; 0: all"
    )
    evaluate_every: int = Field(
        0, ge=0, le=1_000_000, description="rounds between their evaluations; 0: after the last round only"
    )
    global_samples: int = Field(
        1000,
        ge=0,
        le=10_000_000,
        description="test images of all classes on which each is scored besides; 0: all of the test split",
    )
    tuned: bool = Field(
        False,
        description="on text, after the last round, what the local training of a first round, on their own text, makes"
        " of their models is scored, too",
    )


class Fedsr(Section):
    stochastic: bool = Field(
        True, description="features pass a stochastic bottleneck; false: FedL2R, its deterministic form"
    )
    l2: float = Field(0.01, ge=0, description="weight of the representation's length")
    l2_form: Literal["norm", "squared"] = Field("norm", description="that length, as in the authors' code, or squared")
    cmi: float = Field(0.001, ge=0, description="weight of its divergence from the client's own reference by class")
    steps: int = Field(5, ge=0, le=1_000_000, description="local steps of a round; 0: train.local-epochs")
    keep_momentum: bool = Field(
        False, description="clients go on with their own momentum in the next round, as in the authors' code"
    )
    draws: int = Field(
        20,
        ge=0,
        le=10_000,
        description="draws of the representation over which the run's answers are averaged; 0: its mean, by which a"
        " personalised model always answers",
    )


class Fedadg(Section):
    reference: Literal["learned", "fixed"] = Field(
        "learned", description="the generator learns, or stays at its random start, as in the authors' second variant"
    )
    alpha: float = Field(0.85, ge=0, le=1, description="weight of the cross entropy; the rest is the discriminator's")
    smoothing: float = Field(0.01, ge=0, lt=1, description="share of a label that goes to the other classes")
    warm_up_epochs: int = Field(1, ge=0, le=100_000, description="local epochs of cross entropy alone, E0")
    epochs: int = Field(1, ge=0, le=100_000, description="local epochs against the discriminator, E1")
    noise: int = Field(64, ge=1, le=1_000_000, description="numbers of noise that the generator reads (paper: 2048)")
    generator_hidden: int = Field(256, ge=1, le=1_000_000, description="hidden units of the generator (4096)")
    discriminator_hidden: int = Field(256, ge=1, le=1_000_000, description="hidden units of the discriminators (1024)")
    projection: int = Field(64, ge=1, le=1_000_000, description="what the discriminator makes of features (1024)")
    lr: float = Field(0.007, gt=0, description="rate of generator and discriminator")
    momentum: float = Field(0.9, ge=0, lt=1, description="their momentum; the discriminator's stays with its client")
    weight_decay: float = Field(1e-5, ge=0, description="their weight decay")


class Fedmoe(Section):
    memory: str = Field(
        "0.75",
        description="what clients have room for in training, in turn, comma between: what all share and this share of"
        " all experts",
    )
    budget: float = Field(
        0.8, gt=0, le=1, description="share of its memory that a client's first experts may take; advice may use it all"
    )
    probe: Literal["lora", "full", "none"] = Field(
        "lora",
        description="how a client finds out, once, which experts its text activates: by adapters or the whole model;"
        " none: its first experts are drawn at random, and it tells nothing of its text",
    )
    probe_steps: int = Field(15, ge=1, le=1_000_000, description="local steps of that, by Adam")
    probe_lr: float = Field(
        0.0,
        ge=0,
        description="their rate in every round; 0: that of training if train.optimizer is adam, else 0.001",
    )
    rank: int = Field(4, ge=1, le=4096, description="rank of the adapters")
    recommend: bool = Field(
        True, description="clients whose score stands still get as many experts as clients like them, for a trial"
    )
    patience: int = Field(
        2, ge=1, le=100_000, description="rounds of its own without a better score, for advice and for a trial alike"
    )
    neighbours: int = Field(3, ge=1, le=100_000, description="clients most like one (K)")
    counts: Literal["activated", "held"] = Field(
        "activated", description="who an expert's average is over: clients whose tokens it got, or all that hold it"
    )


class Specialist(Section):
    start: Literal["finetuned", "scratch"] = Field(
        "finetuned", description="a client's specialist begins as the fine-tuned global model, or at random"
    )
    trains: Literal["gate", "gate+local", "all"] = Field(
        "gate+local", description="what the mixture trains; all: the client's own copy of the global model, too"
    )
    mix: Literal["probs", "log-probs"] = Field(
        "probs", description="what the gate mixes; log-probs: an upper bound of that loss, as the public code has it"
    )
    gate: Literal["network", "head"] = Field(
        "network", description="a network like the experts with one output, or one unit on the global model's features"
    )
    lr: float = Field(1e-3, gt=0, description="Adam's rate for the mixture")


class Adapt(Section):
    start: Literal["random", "common"] = Field(
        "random", description="a model that a client trains alone begins at random or as the common expert (local)"
    )
    lr: float = Field(1e-3, gt=0, description="Adam's rate where a client trains a model of its own (local, finetune)")
    batch_size: int = Field(10, ge=1, le=1_000_000, description="its batch size")
    max_epochs: int = Field(60, ge=0, le=100_000, description="epochs at most; 0: the model stays as it was")
    check_every: int = Field(
        5, ge=1, le=100_000, description="epochs between two looks at the validation part; first after one"
    )
    min_fall: float = Field(0.01, ge=0, description="fall of the validation loss that counts as better")
    patience: int = Field(
        10, ge=1, le=100_000, description="looks without one after which it stops; the best weights are kept"
    )


class EarlyStopping(Section):
    check_every: int = Field(
        0,
        ge=0,
        le=100_000,
        description="rounds between two looks at the one model that all share, by the validation parts of a round's"
        " clients; first after one; the best that was looked at is kept in the end; 0: none, and the last round's is"
        " kept",
    )
    patience: int = Field(5, ge=1, le=100_000, description="looks that find it no better after which the run ends")


class Personalize(Section):
    read_out: Literal["", "top-1", "mixture", "blend", "mean", "surest", "familiar"] = Field(
        "",
        description="how K experts answer; blend: mixture x common expert; surest: the one whose answers to all of a"
        " client's images are surest; familiar: the best, or the common expert where it is less sure of them than"
        " usual by less; empty: the method's own way",
    )
    prior: Literal["none", "em", "support", "map"] = Field(
        "none",
        description="label-prior correction on the client's unlabelled data: class shares by EM, only which classes are"
        " there (2 %), shares drawn to equal ones (few images)",
    )
    statistics: Literal["trained", "own"] = Field(
        "trained", description="batch-norm statistics that models answer with; own: of the client's unlabelled data"
    )
