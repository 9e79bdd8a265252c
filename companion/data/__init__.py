"""Data with known answers, the sets that come with scikit-learn, and loaders for your own files."""

from companion.data.bundled import (
    Split,
    load_breast_cancer,
    load_diabetes,
    load_digits,
    load_iris,
    load_photos,
    load_wine,
    photo_crops,
)
from companion.data.files import (
    FeatureShards,
    ImageFolderAD,
    load_features,
    load_labels,
    read_cifar_binary,
    read_idx,
    read_mnist_idx,
)
from companion.data.glyphs import PALETTE, ColorDigits, color_digits, load_digits_images, make_color_digits
from companion.data.manifolds import MANIFOLDS, make_manifold, random_frame
from companion.data.mixtures import BayesRisk, GaussianMixture
from companion.data.sprites import COLORS, SHAPES, Sprites, make_sprites
from companion.data.textures import DEFECTS, TEXTURES, Textures, make_textures
from companion.data.wrappers import long_tailed, noisy_labels, stratified_split, transition_matrix

__all__ = [
    "COLORS",
    "DEFECTS",
    "MANIFOLDS",
    "PALETTE",
    "SHAPES",
    "TEXTURES",
    "BayesRisk",
    "ColorDigits",
    "FeatureShards",
    "GaussianMixture",
    "ImageFolderAD",
    "Split",
    "Sprites",
    "Textures",
    "color_digits",
    "load_breast_cancer",
    "load_diabetes",
    "load_digits",
    "load_digits_images",
    "load_features",
    "load_iris",
    "load_labels",
    "load_photos",
    "load_wine",
    "long_tailed",
    "make_color_digits",
    "make_manifold",
    "make_sprites",
    "make_textures",
    "noisy_labels",
    "photo_crops",
    "random_frame",
    "read_cifar_binary",
    "read_idx",
    "read_mnist_idx",
    "stratified_split",
    "transition_matrix",
]
