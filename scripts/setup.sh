#!/usr/bin/env bash
# Makes the environment (scripts/environment.py) and prints the path of its Python; at once when it is already there.
#   scripts/setup.sh [--tests] [--check] [-- the server's flags]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

if [[ -n ${PYTHON:-} ]] && ! fits "$PYTHON"; then
  echo "error: PYTHON=$PYTHON is no Python 3.11, 3.12 or 3.13 that runs. Name one, or leave PYTHON unset." >&2
  exit 1
fi
for python in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.13; do
  if fits "$python"; then
    exec "$python" "$here/environment.py" "$@"
  fi
done
echo "error: no Python 3.11, 3.12 or 3.13 was found (looked for python3, python3.11 to python3.13).
  Install one (Debian and Ubuntu: apt-get install python3 python3-venv), or name one: PYTHON=/path/to/python3.12" >&2
exit 1
