"""Models that are traced or read, so that a layer takes over the activation after it."""
