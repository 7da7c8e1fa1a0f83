"""The demo: a small trained model, questions about pictures that it has never seen, and what happens without its parts."""
