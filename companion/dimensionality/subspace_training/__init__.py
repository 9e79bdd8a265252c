"""Training few numbers of a large network: which few are enough, and what choosing them does to the rest.

One file per mechanism: `parameters` (what the others share, and training a chosen part only), `random_subspace`,
`low_rank`, `tensors`, `task_vectors`, `stealth`, `hypernetwork`, `prompts`.
"""

from companion.dimensionality.subspace_training.hypernetwork import HyperNetwork, circle_encode
from companion.dimensionality.subspace_training.low_rank import (
    LoRALinear,
    detachment_threshold,
    intruder_dimensions,
    scale_directions,
    singular_overlap,
)
from companion.dimensionality.subspace_training.parameters import FrozenModule, train_only, trainable_count
from companion.dimensionality.subspace_training.prompts import (
    Prompted,
    PromptedTower,
    PromptedTowers,
    SurgeryBlock,
    TwoTowers,
    alignment,
    feature_shift,
    shift_consistency_loss,
)
from companion.dimensionality.subspace_training.random_subspace import (
    FastfoodDraw,
    RandomSubspace,
    StructureAwareSubspace,
    compressed_size,
    compression_bound,
    fastfood,
    fastfood_draw,
    hadamard_transform,
    needed_dimension,
    quantize,
)
from companion.dimensionality.subspace_training.stealth import JetPack, response_to, separability_dimension
from companion.dimensionality.subspace_training.task_vectors import ATLAS, task_vector
from companion.dimensionality.subspace_training.tensors import (
    FlatDelta,
    TuckerDelta,
    hosvd,
    unfold,
    unfolding_floor,
)

__all__ = [
    "ATLAS",
    "FastfoodDraw",
    "FlatDelta",
    "FrozenModule",
    "HyperNetwork",
    "JetPack",
    "LoRALinear",
    "Prompted",
    "PromptedTower",
    "PromptedTowers",
    "RandomSubspace",
    "StructureAwareSubspace",
    "SurgeryBlock",
    "TuckerDelta",
    "TwoTowers",
    "alignment",
    "circle_encode",
    "compressed_size",
    "compression_bound",
    "detachment_threshold",
    "fastfood",
    "fastfood_draw",
    "feature_shift",
    "hadamard_transform",
    "hosvd",
    "intruder_dimensions",
    "needed_dimension",
    "quantize",
    "response_to",
    "scale_directions",
    "separability_dimension",
    "shift_consistency_loss",
    "singular_overlap",
    "task_vector",
    "train_only",
    "trainable_count",
    "unfold",
    "unfolding_floor",
]
