# shellcheck shell=bash
# Sourced by the scripts of this folder: makes sure that programs are there, by Debian's packages where they can be had.
#
# need PROGRAM=PACKAGE ...   returns 1 and says what is missing if something still is; never asks, never fails the caller.

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

need() {
    local pair missing=()
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null 2>&1 || missing+=("${pair#*=}")
    done
    [ "${#missing[@]}" -eq 0 ] && return 0
    if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" -eq 0 ]; then
        say "installing ${missing[*]}"
        [ -n "${APT_UPDATED:-}" ] || apt-get update -qq >/dev/null 2>&1 || say "cannot refresh the list of packages"
        APT_UPDATED=1
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
            say "apt-get could not install ${missing[*]}"
    fi
    missing=()
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null 2>&1 || missing+=("${pair%%=*} (package ${pair#*=})")
    done
    [ "${#missing[@]}" -eq 0 ] && return 0
    say "not on this machine: ${missing[*]}"
    return 1
}
