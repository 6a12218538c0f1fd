"""The files of one tuned lens as they are published: its own without local paths, its licences, NOTICE and card."""

import shutil
from pathlib import Path

from ..atomic_write import write_json
from ..data.activation_cache import file_hash
from ..hub.upstream_license import UpstreamLicense
from ..hub_upload import check_finite, publishable_json
from ..lens_artifact import PROVENANCE_FILE, WEIGHTS_FILE
from ..public_names import without_paths
from .cards import write_lens_card, write_notice
from .content_checks import TunedLensFolder
from .index import GATES, LICENSES, TREE, IndexEntry
from .lens_places import CONFIG_FILE, METRICS_FILE
from .public_files import public_json


def stage_lens(
    folder: TunedLensFolder, name: str, repo: str, tag: str, license: UpstreamLicense, target: Path
) -> IndexEntry:
    """Writes what a release has of one lens.

    Args:
        name: of the model in INDEX.json.
        target: the folder that is uploaded.

    Returns:
        Its entry for INDEX.json.

    Raises:
        ValueError: if one of its JSON files is broken, or a number in it NaN or infinite.
    """
    check_finite(folder.config, CONFIG_FILE)
    check_finite(folder.provenance, PROVENANCE_FILE)
    own = target / TREE / name
    own.mkdir(parents=True)
    config, provenance, stand_ins = public_json(folder)
    shutil.copyfile(folder.path / WEIGHTS_FILE, own / WEIGHTS_FILE)
    write_json(own / CONFIG_FILE, config)
    if (folder.path / METRICS_FILE).is_file():
        write_json(own / METRICS_FILE, without_paths(publishable_json(folder.path / METRICS_FILE), stand_ins))
    licenses = _write_licenses(name, license, target)
    write_notice(own, name, repo, tag, provenance, license, list(licenses))
    write_lens_card(own, name, repo, tag, config, provenance, license)
    # all but itself, which INDEX.json has
    hashes = {file.name: file_hash(file) for file in sorted(own.iterdir())}
    write_json(own / PROVENANCE_FILE, provenance | {"sha256": hashes})
    return IndexEntry(
        path=f"{TREE}/{name}",
        sha256={file.name: file_hash(file) for file in sorted(own.iterdir())},
        tl_version=tag,
        model_commit=provenance.get("model_commit"),
        tokenizer_commit=provenance.get("tokenizer_commit"),
        acceptance={gate: provenance["acceptance"][gate] for gate in GATES},
        license=license.name,
        licenses=licenses,
    )


def _write_licenses(name: str, license: UpstreamLicense, target: Path) -> dict[str, str]:
    """Path in the repository -> sha256 of the licence texts."""
    written = {}
    for file, text in license.texts.items():
        place = f"{LICENSES}/{name}/{file}"
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        (target / place).write_bytes(text)
        written[place] = file_hash(target / place)
    return written
