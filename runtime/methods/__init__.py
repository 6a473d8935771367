"""One file per layer-skipping method; `base` holds the protocol they implement."""
