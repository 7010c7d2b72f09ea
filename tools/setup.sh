#!/bin/bash
# Installs what is missing, and nothing when nothing is.
#   tools/setup.sh demo   compiler, CMake, libraries                       (make demo)
#   tools/setup.sh test   the above, test tools, second compiler, linters  (make test-cpu, lint, ...)
#   tools/setup.sh venv   the above and .venv with the Python packages     (make test-python)
# Needs root or sudo only when a package is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

group=${1:-demo}
case $group in demo | test | venv) ;; *)
  echo "setup.sh: unknown group '$group': use demo, test or venv" >&2
  exit 2
  ;;
esac

say() { printf '[setup] %s\n' "$*"; }

wanted_packages() { # the packages of the groups up to $group
  local line current=
  while read -r line; do
    case $line in
      '' | '#'*) ;;
      '['*) current=${line//[\[\]]/} ;;
      *) if [[ $current == demo || $group != demo ]]; then echo "$line"; fi ;;
    esac
  done < tools/packages.txt
}

install_packages() {
  if ! command -v dpkg-query > /dev/null || ! command -v apt-get > /dev/null; then
    say "not a Debian system: install the equivalents of these yourself, then go on:"
    wanted_packages | tr '\n' ' '
    echo
    return
  fi
  local missing=() package
  for package in $(wanted_packages); do
    if [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null) != installed ]]; then
      missing+=("$package")
    fi
  done
  if [[ ${#missing[@]} -eq 0 ]]; then
    say "system packages: nothing is missing"
    return
  fi
  local as_root=()
  if [[ $(id -u) -ne 0 ]]; then
    if ! command -v sudo > /dev/null; then
      say "packages are missing, and you are neither root nor is there a sudo. As root, run:" >&2
      say "  apt-get update && apt-get install ${missing[*]}" >&2
      exit 1
    fi
    as_root=(sudo)
  fi
  say "installing ${#missing[@]} packages: ${missing[*]}"
  "${as_root[@]}" apt-get update -q
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -q -y --no-install-recommends "${missing[@]}"
}

find_python() { # the first python3 >= 3.10 in PATH that can make a virtual environment
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 /usr/bin/python3}; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' \
      2> /dev/null; then
      command -v "$candidate"
      return
    fi
  done
  say "no python3 >= 3.10 with the module venv in PATH; set PYTHON=/path/to/python3" >&2
  return 1
}

make_venv() {
  local python stamp=.venv/requirements.stamp
  python=$(find_python)
  # The stamp is written last: an interrupted installation is done again.
  if [[ -x .venv/bin/python ]] && cmp -s tools/requirements-test.txt "$stamp"; then
    say "Python packages: nothing is missing (.venv, $(.venv/bin/python --version))"
    return
  fi
  say "making .venv with $("$python" --version) ($python); torch is large, this takes minutes"
  rm -f "$stamp"
  "$python" -m venv .venv
  .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off \
    -r tools/requirements-test.txt
  cp tools/requirements-test.txt "$stamp"
}

install_packages
if [[ $group == venv ]]; then
  make_venv
fi
