"""The pipeline: from installer and phase scripts to images, and what the store keeps of them."""
