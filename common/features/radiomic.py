"""Radiomic image features without weights: brightness, texture, edges, colour and spectrum in 99 numbers.

They see blur, noise, colour shift and collapse sharply and know nothing of anatomy: a second opinion beside
a network, in the manner of the Frechet radiomic distance (Konz et al. 2024, 2412.01496), on whole images
and in torch. The numbers have units of their own, so they are z-scored by the reference before use; each is
scaled, or taken as a logarithm, so that 0.02 is little for all of them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from polyclinic.common.features.extractor import Extractor

EXTRACTOR_NAME = "radiomic"
BINS = 32  # of the histogram
LEVELS = 16  # grey levels of the co-occurrence matrix
DISTANCES = (1, 2, 4)  # px, co-occurrence
HAAR_LEVELS = 4
SIGMAS = (1.0, 2.0, 4.0)  # px, Laplacian of Gaussian
STEEP = 0.1  # grey levels of 1 a pixel
RINGS = 12  # of the power spectrum
TINY = 1e-6  # about the energy that rounding to 8 bits adds: what is below it is not seen
SMALLEST = 2**HAAR_LEVELS

_FIRST_ORDER = (
    *("mean", "std", "skewness", "log kurtosis", "min", "p5", "p25", "median", "p75", "p95", "max"),
    *("mean deviation", "rms", "entropy", "uniformity"),
)
_TEXTURE = (
    *("contrast", "dissimilarity", "homogeneity", "energy", "correlation", "entropy"),
    *("largest", "cluster shade"),
)
_COLOUR = (
    *("mean R", "mean G", "mean B", "std R", "std G", "std B", "chroma r", "chroma g"),
    *("chroma r std", "chroma g std", "saturation", "saturation std", "corr RG", "corr GB", "corr RB"),
)
_SHAPE = (
    *("log gradient", "log gradient std", "steep"),
    *("mirror", "border", "centre minus border"),
)
NAMES: tuple[str, ...] = (
    *(f"first order: {name}" for name in _FIRST_ORDER),
    *(f"co-occurrence {d} px: {name}" for d in DISTANCES for name in _TEXTURE),
    *(f"Haar {level}: {band}" for level in range(1, HAAR_LEVELS + 1) for band in ("LH", "HL", "HH")),
    *(f"LoG {s:g}: {x}" for s in SIGMAS for x in ("log energy", "log mean", "skewness", "log kurtosis")),
    *(f"colour: {name}" for name in _COLOUR),
    *(f"spectrum: ring {ring}" for ring in range(1, RINGS + 1)),
    *("spectrum: slope", "spectrum: anisotropy", "spectrum: entropy"),
    *(f"shape: {name}" for name in _SHAPE),
)
PREPROCESSING = (
    f"RGB in [0, 1] at its own size; {len(NAMES)} features (first order, co-occurrence, Haar energies, "
    "Laplacian of Gaussian, chromaticity, power spectrum, symmetry), version 1; z-scored by the reference"
)


def radiomic(device: str = "cpu") -> Extractor:
    """The extractor; it has no weights."""
    return Extractor(
        EXTRACTOR_NAME, len(NAMES), PREPROCESSING, "", radiomic_features, standardise=True, device=device
    )


def radiomic_features(images: Tensor) -> Tensor:
    """Compute the features of `NAMES`.

    Args:
        images: RGB in [0, 1], [B, 3, H, W], H and W at least 16.

    Returns:
        [B, 99], float32; not finite where an image is not.

    Raises:
        ValueError: The images are too small.
    """
    if min(images.shape[-2:]) < SMALLEST:
        raise ValueError(f"radiomic features need images of at least {SMALLEST} px")
    grey = (images * images.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1)
    parts = [
        _first_order(grey),
        *(_texture(grey, distance) for distance in DISTANCES),
        _haar(grey),
        _blobs(grey),
        _colour(images),
        _spectrum(grey),
        _shape(grey),
    ]
    return torch.cat(parts, dim=1)


def _standardised_moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, standard deviation, skewness and log kurtosis of each row, [B] each."""
    mean = values.mean(dim=1)
    centred = values - mean[:, None]
    square = centred.square().mean(dim=1)
    std = square.sqrt()
    skewness = centred.pow(3).mean(dim=1) / (square * std + TINY)
    kurtosis = centred.pow(4).mean(dim=1) / (square.square() + TINY)
    return mean, std, skewness.asinh(), kurtosis.log1p()


def _first_order(grey: Tensor) -> Tensor:
    values = grey.flatten(1)
    mean, std, skewness, kurtosis = _standardised_moments(values)
    ranked = values.sort(dim=1).values
    last = values.shape[1] - 1
    ranks = [ranked[:, round(q * last)] for q in (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)]
    deviation = (values - mean[:, None]).abs().mean(dim=1)
    histogram = _histogram(_levels(values, BINS), BINS)
    columns = [mean, std, skewness, kurtosis, *ranks, deviation, values.square().mean(dim=1).sqrt()]
    return torch.stack([*columns, _entropy(histogram), histogram.square().sum(dim=1)], dim=1)


def _levels(values: Tensor, count: int) -> Tensor:
    """Grey levels 0 .. count - 1; an image that is not finite shows elsewhere."""
    return (values.nan_to_num(0.0) * count).long().clamp(0, count - 1)


def _histogram(levels: Tensor, count: int) -> Tensor:
    """Share of each level in each row, [B, count]."""
    rows = torch.arange(len(levels), device=levels.device)[:, None] * count
    counted = torch.bincount((levels + rows).flatten(), minlength=len(levels) * count)
    return counted.reshape(len(levels), count).float() / levels.shape[1]


def _entropy(shares: Tensor) -> Tensor:
    """Entropy of each row over its maximum, [B]."""
    return torch.special.entr(shares).sum(dim=1) / torch.tensor(float(shares.shape[1])).log()


def _texture(grey: Tensor, distance: int) -> Tensor:
    """Haralick's features of the co-occurrence matrix, symmetric, averaged over four directions."""
    levels = _levels(grey, LEVELS)
    d, height, width = distance, *grey.shape[-2:]
    pairs = [
        (levels[:, :, : width - d], levels[:, :, d:]),
        (levels[:, : height - d], levels[:, d:]),
        (levels[:, : height - d, : width - d], levels[:, d:, d:]),
        (levels[:, : height - d, d:], levels[:, d:, : width - d]),
    ]
    shares = [_histogram((a * LEVELS + b).flatten(1), LEVELS**2) for a, b in pairs]
    joint = torch.stack(shares).mean(dim=0).reshape(-1, LEVELS, LEVELS)
    joint = (joint + joint.transpose(1, 2)) / 2
    place = torch.arange(LEVELS, device=grey.device, dtype=torch.float32)
    first, second = place[:, None], place[None, :]

    def expect(of: Tensor) -> Tensor:
        return (joint * of).sum(dim=(1, 2))

    step = (first - second).abs() / (LEVELS - 1)
    mean = expect(first.expand(LEVELS, LEVELS))
    centred = place[None] - mean[:, None]
    spread = (joint.sum(dim=2) * centred.square()).sum(dim=1)
    covariance = (joint * centred[:, :, None] * centred[:, None, :]).sum(dim=(1, 2))
    shade = (joint * (centred[:, :, None] + centred[:, None, :]).pow(3)).sum(dim=(1, 2)) / LEVELS**3
    columns = [
        (expect(step.square()) + TINY).log10(),
        expect(step),
        expect(1 / (1 + (first - second).square())),
        joint.square().sum(dim=(1, 2)).sqrt(),
        (covariance + TINY) / (spread + TINY),
        _entropy(joint.flatten(1)),
        joint.amax(dim=(1, 2)),
        shade,
    ]
    return torch.stack(columns, dim=1)


def _haar(grey: Tensor) -> Tensor:
    """Log mean energy of the three detail bands of an orthonormal Haar transform, level by level."""
    columns = []
    for _ in range(HAAR_LEVELS):
        grey = grey[:, : grey.shape[1] // 2 * 2, : grey.shape[2] // 2 * 2]
        a, b = grey[:, ::2, ::2], grey[:, ::2, 1::2]
        c, d = grey[:, 1::2, ::2], grey[:, 1::2, 1::2]
        bands = ((a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2)
        columns += [(band.square().mean(dim=(1, 2)) + TINY).log10() for band in bands]
        grey = (a + b + c + d) / 2
    return torch.stack(columns, dim=1)


@functools.lru_cache(maxsize=8)
def _log_response(sigma: float, height: int, width: int) -> Tensor:
    """Scale-normalised Laplacian of Gaussian at the frequencies of an rfft2: -(s w)^2 exp(-(s w)^2 / 2)."""
    y, x = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :]
    square = (2 * torch.pi * sigma) ** 2 * (y**2 + x**2)
    return -square * torch.exp(-square / 2)


def _blobs(grey: Tensor) -> Tensor:
    """How strongly, and how unevenly, Laplacians of Gaussians answer, one after the other."""
    reach = round(3 * max(SIGMAS))
    padded = F.pad(grey[:, None], (reach,) * 4, mode="reflect")[:, 0]
    height, width = padded.shape[-2:]
    transform = torch.fft.rfft2(padded)
    columns = []
    for sigma in SIGMAS:
        kernel = _log_response(sigma, height, width).to(grey.device)
        whole = torch.fft.irfft2(transform * kernel, s=(height, width))
        response = whole[:, reach:-reach, reach:-reach].flatten(1)
        mean, std, skewness, kurtosis = _standardised_moments(response)
        energy = (std.square() + mean.square() + TINY).log10()
        columns += [energy, (response.abs().mean(dim=1) + TINY).log10(), skewness, kurtosis]
    return torch.stack(columns, dim=1)


def _colour(images: Tensor) -> Tensor:
    pixels = images.flatten(2)
    means, stds = pixels.mean(dim=2), pixels.std(dim=2, correction=0)
    chroma = (pixels + TINY) / (pixels.sum(dim=1, keepdim=True) + 3 * TINY)
    most, least = pixels.amax(dim=1), pixels.amin(dim=1)
    saturation = (most - least) / (most + TINY)
    centred = pixels - means[:, :, None]
    covariance = centred @ centred.transpose(1, 2) / pixels.shape[2]
    correlation = (covariance + TINY) / (stds[:, :, None] * stds[:, None, :] + TINY)
    pairs = [correlation[:, 0, 1], correlation[:, 1, 2], correlation[:, 0, 2]]
    spreads = torch.stack([*(chroma[:, i].std(dim=1, correction=0) for i in (0, 1))], dim=1)
    single = torch.stack([saturation.mean(dim=1), saturation.std(dim=1, correction=0), *pairs], dim=1)
    return torch.cat([means, stds, chroma[:, :2].mean(dim=2), spreads, single], dim=1)


@functools.lru_cache(maxsize=8)
def _rings(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ring of each frequency of an rfft2 (RINGS: outside), its weight, and whether it runs across."""
    y, x = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :]
    radius = (y**2 + x**2).sqrt()
    ring = (radius / 0.5 * RINGS).long().clamp_max(RINGS)
    # All but the first and (for even widths) the last column stand for their mirror image, too.
    weight = torch.full((1, width // 2 + 1), 2.0)
    weight[:, 0] = 1.0
    if width % 2 == 0:
        weight[:, -1] = 1.0
    return ring.flatten(), (weight * (radius > 0)).flatten(), (x > y.abs()).flatten()


def _spectrum(grey: Tensor) -> Tensor:
    height, width = grey.shape[-2:]
    window = torch.hann_window(height, device=grey.device)[:, None] * torch.hann_window(
        width, device=grey.device
    )
    centred = (grey - grey.mean(dim=(1, 2), keepdim=True)) * window
    ring, weight, across = (part.to(grey.device) for part in _rings(height, width))
    power = torch.fft.rfft2(centred).abs().square().flatten(1) / (height * width) * weight
    sums = torch.zeros(len(grey), RINGS + 1, device=grey.device).index_add(1, ring, power)[:, :RINGS]
    sizes = torch.zeros(RINGS + 1, device=grey.device).index_add(0, ring, weight)[:RINGS].clamp_min(1)
    rings = (sums / sizes + TINY).log10()
    middle = ((torch.arange(RINGS, device=grey.device) + 0.5) / RINGS).log10()
    middle = middle - middle.mean()
    slope = (rings * middle).sum(dim=1) / middle.square().sum()
    sideways, upright = (power * across).sum(dim=1) + TINY, (power * ~across).sum(dim=1) + TINY
    shares = (sums + TINY) / (sums + TINY).sum(dim=1, keepdim=True)
    return torch.cat([rings, torch.stack([slope, (sideways / upright).log10(), _entropy(shares)], 1)], dim=1)


def _shape(grey: Tensor) -> Tensor:
    steps = [(grey[:, 1:, :-1] - grey[:, :-1, :-1]), (grey[:, :-1, 1:] - grey[:, :-1, :-1])]
    gradient = (steps[0].square() + steps[1].square()).sqrt().flatten(1)
    flat, mirrored = grey.flatten(1), grey.flip(2).flatten(1)
    centred, other = (v - v.mean(dim=1, keepdim=True) for v in (flat, mirrored))
    mirror = ((centred * other).mean(dim=1) + TINY) / (centred.square().mean(dim=1) + TINY)
    edge = max(1, min(grey.shape[-2:]) // 8)
    inner = grey[:, edge:-edge, edge:-edge]
    border = (grey.sum(dim=(1, 2)) - inner.sum(dim=(1, 2))) / (grey[0].numel() - inner[0].numel())
    columns = [
        (gradient.mean(dim=1) + TINY).log10(),
        (gradient.std(dim=1, correction=0) + TINY).log10(),
        (gradient > STEEP).float().mean(dim=1),
        mirror,
        border,
        inner.mean(dim=(1, 2)) - border,
    ]
    return torch.stack(columns, dim=1)
