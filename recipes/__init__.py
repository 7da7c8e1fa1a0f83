"""The shipped recipes: one YAML file each; `moiie recipe ls` lists them."""
