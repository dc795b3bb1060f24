"""Allowed values of the settings that select one of several options."""

from typing import Literal, get_args

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]
Lockstep = Literal["auto", "always", "never"]
Attention = Literal["auto", "xla", "blockwise", "cudnn", "triton", "mosaic", "splash"]
Workflow = Literal["on_demand", "rag", "direct", "agent"]
Match = Literal["EM", "SubEM"]
Advantage = Literal["grpo", "mean", "rloo"]
RatioLevel = Literal["token", "sequence", "trajectory"]
KLEstimator = Literal["k1", "k2", "k3"]
LossAggregation = Literal["token", "sequence", "fixed"]
Schedule = Literal["constant", "linear", "cosine", "sigmoid"]
OldLogProbs = Literal["engine", "trainer"]
Reference = Literal["device", "host"]
Overlong = Literal["keep", "mask", "penalty"]
TextTarget = Literal["q", "k", "v", "out", "gate", "up", "down"]
TextSearch = Literal["auto", "none", "local", "serpapi", "serper", "searxng", "retrieval"]
ImageSearch = Literal["auto", "none", "local", "serpapi", "serper", "fvqa"]
Reader = Literal["none", "local", "jina"]
PictureSearch = Literal["auto", "local", "searxng", "serpapi", "serper"]
QuestionCheck = Literal["title", "blind", "shown", "answerable", "sound"]
CacheMode = Literal["use", "resume", "record", "replay"]
VisionTarget = Literal[
    "vision.qkv",
    "vision.out",
    "vision.gate",
    "vision.up",
    "vision.down",
    "vision.fc1",
    "vision.fc2",
]

DTYPES: tuple[str, ...] = get_args(Dtype)
REMAT: tuple[str, ...] = get_args(Remat)
ATTENTION: tuple[str, ...] = get_args(Attention)
LOCKSTEP: tuple[str, ...] = get_args(Lockstep)
WORKFLOWS: tuple[str, ...] = get_args(Workflow)
MATCHES: tuple[str, ...] = get_args(Match)
ADVANTAGES: tuple[str, ...] = get_args(Advantage)
RATIO_LEVELS: tuple[str, ...] = get_args(RatioLevel)
KL_ESTIMATORS: tuple[str, ...] = get_args(KLEstimator)
LOSS_AGGREGATIONS: tuple[str, ...] = get_args(LossAggregation)
SCHEDULES: tuple[str, ...] = get_args(Schedule)
OLD_LOGPROBS: tuple[str, ...] = get_args(OldLogProbs)
REFERENCES: tuple[str, ...] = get_args(Reference)
OVERLONG: tuple[str, ...] = get_args(Overlong)
TEXT_SEARCHES: tuple[str, ...] = get_args(TextSearch)
IMAGE_SEARCHES: tuple[str, ...] = get_args(ImageSearch)
READERS: tuple[str, ...] = get_args(Reader)
PICTURE_SEARCHES: tuple[str, ...] = get_args(PictureSearch)
QUESTION_CHECKS: tuple[str, ...] = get_args(QuestionCheck)
CACHE_MODES: tuple[str, ...] = get_args(CacheMode)
TEXT_TARGETS: tuple[str, ...] = get_args(TextTarget)
LORA_TARGETS: tuple[str, ...] = TEXT_TARGETS + get_args(VisionTarget)
