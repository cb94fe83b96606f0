# shellcheck shell=bash
# The virtual environment that scripts/demo and scripts/test share. Sourced from the repository's root.

die() {
  echo "error: $*" >&2
  exit 1
}

# The first Python of PATH that is new enough.
find_python() {
  local candidate
  for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  die "Python 3.11 or newer is needed, and none is on PATH"
}

# What the environment is made of; a changed line makes a new one.
venv_stamp() {
  "$1" -c '
import hashlib, sys
digest = hashlib.sha256(sys.version.encode())
for path in ("pyproject.toml", "constraints.txt"):
    digest.update(open(path, "rb").read())
print(digest.hexdigest(), sys.argv[1])
' "$2"
}

# ensure_chromium: for the tests of the dashboard. Where it is not there and cannot be had, they are skipped.
ensure_chromium() {
  if command -v chromium chromium-browser google-chrome >/dev/null; then
    return
  fi
  if ((EUID == 0)) && command -v apt-get >/dev/null; then
    echo "Installing chromium for the tests of the dashboard ..."
    if timeout 120 apt-get -qq update &>/dev/null &&
      DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq install -y --no-install-recommends chromium &>/dev/null; then
      return
    fi
  fi
  echo "No chromium (on Debian: apt install chromium): the tests of the dashboard in a browser are skipped."
}

# ensure_venv run|dev: .venv holds manylora in editable form, with the dev extra if asked. Reused while nothing it is
# made of has changed; "dev" serves "run" too.
ensure_venv() {
  local extra=$1 python stamp present=""
  python=$(find_python)
  stamp=$(venv_stamp "$python" "$extra")
  [[ -f .venv/stamp ]] && present=$(<.venv/stamp)
  if [[ $present == "$stamp" || $present == "${stamp% *} dev" ]]; then
    return
  fi
  if [[ ${present% *} != "${stamp% *}" ]]; then
    echo "Making .venv (the first time this downloads torch, which takes a while) ..."
    "$python" -m venv --clear .venv || die "python -m venv failed (on Debian: apt install python3-venv)"
  else
    echo "Adding the $extra dependencies to .venv ..."
  fi
  rm -f .venv/stamp
  local target="."
  [[ $extra == dev ]] && target=".[dev]"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
    -c constraints.txt -e "$target" </dev/null || die "pip install failed"
  echo "$stamp" >.venv/stamp
}
