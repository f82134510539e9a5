"""The result of an evaluation, as numbers and as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_starflow.evaluation.likelihoods import UNUSUAL, LikelihoodGap, Typicality
from mlx_starflow.evaluation.measures import Estimate
from mlx_starflow.evaluation.memorization import Memorization

USUAL_COUNT = 50_000
"""Samples that published FIDs are of."""


@dataclass(frozen=True)
class SampleMeasures:
    """How samples compare with real pictures.

    Attributes:
        features: what they are compared by.
        frechet: the squared Fréchet distance, FID in Inception's features.
        kernel: the kernel distance, KID in Inception's features; None if only statistics were given.
        precision, recall: shares, 0 to 1; None as well.
    """

    features: str
    frechet: float
    kernel: Estimate | None = None
    precision: float | None = None
    recall: float | None = None


@dataclass(frozen=True)
class FlowMeasures:
    """What the flow says itself, of pictures that it has not seen if there are such.

    Attributes:
        of: "held-out" or "data": which pictures `nll` and `prompt_fit` are of.
        pictures: how many.
        draws: of the training noise.
        nll: nats per dimension, without a prompt.
        bits: the same as bits per pixel and channel, of a dequantized pixel model.
        prompt_fit: log p(x | prompt) - log p(x) in nats a picture; None without captions.
        samples_prompt_fit: the same of samples with their prompts.
        typicality: of samples.
        gap: between training and held-out pictures; None if either are missing.
    """

    of: str
    pictures: int
    draws: int
    nll: Estimate
    bits: float | None
    prompt_fit: Estimate | None
    samples_prompt_fit: Estimate | None
    typicality: Typicality | None
    gap: LikelihoodGap | None


@dataclass(frozen=True)
class Evaluation:
    """How good a model is.

    Attributes:
        model: its name.
        dimension: of its data, for NLL: "latent dimension".
        counts: pictures by kind: "samples", "data", "held-out".
        settings: how the samples were made.
        clip: mean CLIP score of samples, with the CLIP's name; None without one.
        clip_by_kind: the same for each kind of prompt that the list names.
        certificate: the worst |f(x) - z| of all samples, if it was asked for.
        skipped: names of pictures that could not be read, and why.
        warnings: what keeps these numbers from meaning what they seem to.
    """

    model: str
    dimension: str
    counts: Mapping[str, int]
    settings: Mapping[str, Any]
    samples: SampleMeasures | None = None
    clip: tuple[str, Estimate] | None = None
    clip_by_kind: Mapping[str, Estimate] | None = None
    flow: FlowMeasures | None = None
    memorization: Memorization | None = None
    certificate: float | None = None
    skipped: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, as JSON has them."""
        values: dict[str, Any] = {"model": self.model, "pictures": dict(self.counts), "settings": dict(self.settings)}
        if self.samples is not None:
            values["samples"] = _plain(self.samples)
        if self.clip is not None:
            values["clip"] = {"model": self.clip[0], **self.clip[1].to_dict()}
            if self.clip_by_kind:
                values["clip"]["by_kind"] = {kind: each.to_dict() for kind, each in self.clip_by_kind.items()}
        if self.flow is not None:
            values["likelihood"] = {"unit": f"nats per {self.dimension}", **_plain(self.flow)}
        if self.memorization is not None:
            values["memorization"] = asdict(self.memorization)
        if self.certificate is not None:
            values["certificate"] = self.certificate
        values["skipped"] = [{"picture": name, "reason": reason} for name, reason in self.skipped]
        return values | {"warnings": list(self.warnings)}

    def lines(self) -> Iterator[str]:
        """The report as text."""
        counted = ", ".join(f"{count:,} {kind}" for kind, count in self.counts.items())
        yield f"{self.model}: {counted}"
        if self.samples is not None:
            yield from _sample_lines(self.samples)
        if self.clip is not None:
            yield _line("CLIP score", f"{self.clip[1]}  ({self.clip[0]})")
            for kind, each in (self.clip_by_kind or {}).items():
                yield _line(f"  {kind}", str(each))
        if self.certificate is not None:
            yield _line("certificate", f"{self.certificate:.1e}  (the worst |f(x) - z| of all samples)")
        if self.flow is not None:
            yield from self._flow_lines(self.flow)
        if self.memorization is not None:
            yield from _memorization_lines(self.memorization)
        for warning in self.warnings:
            yield f"note: {warning}"

    def _flow_lines(self, flow: FlowMeasures) -> Iterator[str]:
        bits = "" if flow.bits is None else f", {flow.bits:.3f} bits per pixel and channel"
        yield _line("NLL", f"{flow.nll} nats per {self.dimension}{bits}  ({flow.pictures:,} {flow.of})")
        if flow.prompt_fit is not None:
            yield _line("prompt fit", f"{flow.prompt_fit} nats a picture  ({flow.of})")
        if flow.samples_prompt_fit is not None:
            yield _line("", f"{flow.samples_prompt_fit} nats a picture  (samples)")
        if flow.typicality is not None:
            share = f"{flow.typicality.unusual:.1%} further than {UNUSUAL:g}"
            yield _line("typicality", f"{flow.typicality.deviation} standard deviations from real pictures, {share}")
        if flow.gap is not None:
            gap = f"{flow.gap.difference} nats per {self.dimension} less likely than training pictures"
            yield _line("held-out", f"{gap}, p = {flow.gap.p:.2g}")


def _sample_lines(samples: SampleMeasures) -> Iterator[str]:
    inception = samples.features.startswith("Inception")
    yield _line("FID" if inception else "Fréchet", f"{samples.frechet:.4f}  ({samples.features})")
    if samples.kernel is not None:
        value = Estimate(1000 * samples.kernel.mean, 1000 * samples.kernel.error)
        yield _line("KID" if inception else "kernel", f"{value}  (times 1000)")
    if samples.precision is not None and samples.recall is not None:
        yield _line("precision", f"{samples.precision:.4f}")
        yield _line("recall", f"{samples.recall:.4f}")


def _memorization_lines(found: Memorization) -> Iterator[str]:
    yield _line("nearest", f"{found.samples:.4f} from a sample to the nearest training picture (median)")
    if found.held_out is not None and found.p is not None and found.close is not None:
        yield _line("", f"{found.held_out:.4f} from a held-out picture, p = {found.p:.2g} that samples are as far")
        yield _line("", f"{found.close:.1%} of the samples closer than all but 1 % of the held-out pictures")
    if found.pairs:
        first = found.pairs[0]
        yield _line("closest", f"seed {first.seed} to {first.picture}, {first.distance:.4f}")


def _line(name: str, text: str) -> str:
    return f"{name:<11} {text}".rstrip()


def _plain(value: Any) -> Any:
    """Dataclasses as JSON has them."""
    if isinstance(value, Estimate):
        return value.to_dict()
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value
