"""Where models that were registered before export.py had its name look for it: their code is stored with them."""

from dircluster.training.export import load_defense_folder

__all__ = ["load_defense_folder"]
