"""Text to objects: experiments, settings and plug-ins as people write them."""
