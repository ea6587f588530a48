"""What is registered and served: the network, the decoder and the log of its answers, as code and files."""
