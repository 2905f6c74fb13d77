"""What people compare lifelong editing with: constrained fine-tuning, LoRA, and a mixture trained jointly."""
