"""How fast a bundle answers on this machine, and what that figure rests on: `paliedge bench`."""
