"""A package for jetson-containers, and the scripts that install moiie-export on a Jetson; see README.md."""
