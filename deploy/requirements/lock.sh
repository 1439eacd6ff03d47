#!/bin/sh
# Writes hospital.txt and coordinator.txt: every package of constraints.txt that an image installs, with the
# SHA-256 of its files, so that pip installs these bytes or none. Run it after constraints.txt changed:
#     deploy/requirements/lock.sh .venv/bin/uv
# torch is left out with what only its CUDA builds need: its bytes differ by index (see ../Dockerfile).
set -eu
uv=$(realpath "${1:-.venv/bin/uv}")
cd "$(dirname "$0")/../.."
out=deploy/requirements
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

lock() {
	"$uv" pip compile pyproject.toml "$@" --constraint constraints.txt --universal --python-version 3.11 \
		--generate-hashes --no-header --no-annotate --quiet
}

names() { sed -nE 's/^([a-z0-9-]+)==.*/\1/p' "$1"; }

skipped() { names "$1" | grep -E '^(torch|triton|cuda-.*|nvidia-.*|colorama|httpx2-jsfetch)$'; }

without() { sed 's/^/--no-emit-package=/'; }

# Hospitals read DICOM and parquet, too; the coordinator, who installs hospital.txt, may have such a reference.
site="--extra client --extra dicom --extra parquet"
# shellcheck disable=SC2086  # one option a word
lock $site >"$work/all"
# shellcheck disable=SC2046,SC2086
lock $site $(skipped "$work/all" | without) >"$work/hospital"
# The coordinator installs hospital.txt, too: only what its extra adds is in its own file.
# shellcheck disable=SC2046
lock --extra server $(names "$work/all" | without) >"$work/coordinator"

for role in hospital coordinator; do
	{
		echo "# Written by deploy/requirements/lock.sh from constraints.txt; do not edit."
		cat "$work/$role"
	} >"$out/$role.txt"
done
