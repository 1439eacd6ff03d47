"""A site of a few phantoms, trained until it knows them by heart or under differential privacy."""

from pathlib import Path

from polyclinic.client.approval import Approval, prepare_and_approve
from polyclinic.client.final import receive_final
from polyclinic.client.leakage import Findings, inspect_final
from polyclinic.client.ledger_books import create_ledger
from polyclinic.client.training import answer_round
from polyclinic.common.data.sources import read_records
from polyclinic.common.data.table import Record
from polyclinic.common.generators.base import BaseFiles, Tensors, load_family, load_weights, trainable_state
from polyclinic.common.generators.public import hash_base, resolve
from polyclinic.common.settings import DataSettings
from polyclinic.common.study import Resolved, parse_study
from polyclinic.common.wire_reading import RoundOrder, unpack_reply
from polyclinic.server.base import draw_start
from polyclinic.server.evaluation.features import FeatureStore
from polyclinic.server.evaluation.public_scale import public_scale
from polyclinic.server.reference import split_reference
from polyclinic.simulation.phantom import write_phantoms

VAE = "package:phantom/vae"


def phantoms(folder: Path, patients: int) -> tuple[list[Record], list[Record]]:
    """One image and one caption a patient: so many at the site, and the public ones of the other sites."""
    write_phantoms(folder, patients_per_site=max(patients, 44), seed=11, size=64)
    first: dict[str, Record] = {}
    for record in read_records(DataSettings(), folder):
        first.setdefault(
            record.patient, Record(record.patient, record.image, record.captions[:1], record.site)
        )
    names = sorted({record.site or "" for record in first.values()})
    own = [record for record in first.values() if record.site == names[0]][:patients]
    return own, [record for record in first.values() if record.site != names[0]]


def trained_site(
    home: Path,
    own: list[Record],
    public: list[Record],
    *,
    private: bool,
    steps: int,
    store: Path,
    rate: float = 1e-3,
    draws: int = 6,
    held_out: float = 0.45,
    size: int = 64,
    test_key: str | None = None,
) -> tuple[Approval, Tensors]:
    """Approve a study and answer one round, or none for no steps; returns approval and final state."""
    prompts = sorted({record.captions[0] for record in own})[:8]
    study = parse_study(
        {
            "name": "heart",
            "data": {"image_size": size},
            "generator": {"size": "msdm-tiny", "max_tokens": 32, "vae": VAE, "prompt_dropout": 0.0},
            "privacy": {
                "enabled": private,
                "epsilon": 8.0,
                "delta": 1e-3,
                "sampling_rate": 1.0,
                "views": 1,
                "micro_batch": 32,
                "canaries": 0,
            },
            "training": {
                "rounds": 1,
                "steps_per_round": max(1, steps),
                "learning_rate": rate,
                "device": "cpu",
                "threads": 1,
                "test_key": test_key,
            },
            "reference": {"pretrain": 0.0, "probe": 0.0, "evaluate": 1.0},
            "evaluation": {
                "prompts": [{"text": text} for text in prompts],
                "draws": draws,
                "steps": 4 * draws,
                "guidance": 1.0,
                "eta": 0.0,
            },
            "releases": {"leakage_gate": True, "held_out": held_out},
        },
        "heart",
    )
    vae = resolve(VAE, None, "generator.vae")
    family = load_family(study, BaseFiles(vae=vae), encoders=False)
    load_weights(family.module, resolve("package:phantom/start.safetensors", None, "x"))
    start = trainable_state(family.module)
    kept = FeatureStore(store, size, "crop")
    text = resolve(study.generator.text_encoder, None, "generator.text_encoder")
    resolved = Resolved(
        study=study,
        base_hash=hash_base(vae, text, study.generator.max_tokens),
        start_hash="0" * 64,
        reference_hash="0" * 64,
        public=public_scale(
            study,
            split_reference(study, public),
            kept,
            lambda: kept.once(["start"], lambda: draw_start(study, BaseFiles(vae=vae), start)),
        ),
    )
    home.mkdir(mode=0o700)
    (home / "policy.toml").write_text(
        f"declared_patients = {len(own)}\nmin_patients = 5\nallow_not_private = {str(not private).lower()}\n"
        f"allow_test_randomness = {str(test_key is not None).lower()}\n"
    )
    create_ledger(home, "site", simulated=True)
    approval = prepare_and_approve(home, "site", resolved, own, BaseFiles(vae=vae))
    order = RoundOrder(round=1, study_hash=resolved.hash)
    final = start
    if steps:
        moved = unpack_reply(answer_round(home, order, lambda _: start, in_time=lambda: True)).difference
        final = {name: start[name] + moved[name] for name in start}
    receive_final(home, order, lambda _: final, in_time=lambda: True)
    return approval, final


def gate(home: Path, approval: Approval) -> Findings:
    return inspect_final(home, approval)[0]
