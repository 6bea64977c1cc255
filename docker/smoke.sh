#!/bin/sh
# Does what is installed here work? Version, the shipped bundle's digests, one detection. Needs no network.
set -eu
scenes=$(python3 -I -c 'from importlib.resources import files; print(files("paliedge") / "scenes")')
paliedge --version
paliedge info
paliedge verify
found=$(paliedge detect "$scenes/scene-1.png" "yellow star ; green circle")
echo "$found"
test "$(echo "$found" | grep -c "green circle")" -eq 2
