"""A proof checked again, by a second statement of every law; see `check_certificate`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cachefree.checker.binding import bind_to_file, bind_to_graph, bind_to_paths
from cachefree.checker.replay import Checked, WrongCertificateError, replay
from cachefree.errors import CertificateError, Refusal

__all__ = ["Checked", "check_certificate"]


def check_certificate(certificate: Any, rewritten: Any = None) -> Checked:
    """Replays every step of a proof with a checker that shares no code with the prover.

    Args:
        certificate: What ``rewrite`` gave; its ``certificate``; or the path of a saved one. One
            that was written with an ONNX file is compared with the file beside it.
        rewritten: The rewritten model that a saved certificate is to be about: its graph is read
            again, and the paths of the model are compared with those that it captured.

    Returns:
        How many steps were replayed and how many are trusted, and what it was compared with.

    Raises:
        CertificateError: a step is no instance of its law, or the steps do not show what the
            certificate says, or it is about another graph or file.
    """
    folder: Path | None = None
    if isinstance(certificate, (str, os.PathLike)):
        folder = Path(certificate).parent
        content = _loaded(Path(certificate))
    elif hasattr(certificate, "graph_module"):
        rewritten = certificate if rewritten is None else rewritten
        content = certificate.certificate.content
    else:
        content = getattr(certificate, "content", certificate)
    if not isinstance(content, Mapping):
        raise CertificateError(_of_another_kind(certificate))
    if rewritten is not None and not hasattr(rewritten, "graph_module"):
        raise CertificateError(_of_another_kind(rewritten))
    try:
        checked = replay(content)
        if rewritten is not None:
            bind_to_graph(content, rewritten.graph_module)
            bind_to_paths(content, rewritten.certificate.content)
            _compare_domain(content, rewritten)
            checked.bound_to += ["the graph", "the captured paths", "the domain"]
        if folder is not None:
            checked.bound_to += bind_to_file(content, folder)
    except (WrongCertificateError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise CertificateError(
            Refusal(
                "The certificate does not hold.",
                why=f"{error if isinstance(error, WrongCertificateError) else repr(error)}.",
                remedy="Take the certificate of the rewritten model again; if it does not hold "
                "either, the proof is wrong: please report it.",
            )
        ) from error
    return checked


def _of_another_kind(value: object) -> Refusal:
    return Refusal(
        f"check_certificate does not take {type(value).__name__}.",
        why="It takes what rewrite gave, its certificate, or the path of a saved one; and beside a "
        "certificate the rewritten model that it is to be about.",
        remedy="Rewrite first: check_certificate(cachefree.rewrite(model)).",
    )


def _loaded(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CertificateError(
            Refusal(
                f"{path} is no certificate.",
                why=str(error).splitlines()[0],
                remedy="Give the path of a file that certificate.save or to_onnx wrote.",
            )
        ) from error


_VERDICTS = ("PROVED_EXACT", "PROVED_REAL", "CHECKED")  # strongest first


def _compare_domain(content: Any, rewritten: Any) -> None:
    domain = rewritten.interface.domain
    due = [[region.name, len(region.conditions)] for region in domain.regions]
    found = [[region["call"], len(region["facts"])] for region in content["domain"]]
    is_same = content["domain"] == rewritten.certificate.content["domain"]
    if due != found or not is_same or list(domain.fixed) != content["fixed"]:
        raise WrongCertificateError("the rewritten model holds in another domain")
    own = rewritten.certificate.content
    if any(content[key] != own[key] for key in ("model", "laws")) or _told(content) != _told(own):
        raise WrongCertificateError("it tells of another model")
    # the report may claim less: what calls leave on the model is shown elsewhere
    claimed, shown = (
        _VERDICTS.index(verdict) if verdict in _VERDICTS else -1
        for verdict in (str(rewritten.report.verdict), content["verdict"])
    )
    if claimed < max(shown, 0):
        raise WrongCertificateError("the rewritten model has another verdict")


def _told(content: Any) -> Any:
    """The names of the inputs, and what the rules did."""
    names = [name for name, _ in content["graph"]["inputs"]]
    return names, [(edit["rule"], edit["neutral"]) for edit in content["edits"]]
