#!/usr/bin/env bash
# The same from the sources in a git repository: MOIIE_EXPORT_GIT, at MOIIE_EXPORT_REF (default: main).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -z "${MOIIE_EXPORT_GIT:-}" ]; then
    echo "error: there is no release to install here; set MOIIE_EXPORT_GIT to the repository's address" >&2
    exit 1
fi
git clone --depth 1 --branch "${MOIIE_EXPORT_REF:-main}" "$MOIIE_EXPORT_GIT" /opt/moiie-export
MOIIE_EXPORT=/opt/moiie-export "$here/install.sh"
