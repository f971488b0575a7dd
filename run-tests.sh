#!/usr/bin/env bash
# Installs on the first run, then tests everything: style, types, import direction, behaviour.
# With arguments: pytest with these arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=$(scripts/setup.sh --tests)
export PATH="$(dirname "$python"):$PATH"
exec "$python" -m pytest "$@"
