"""The one adapter between the method and ComfyUI: its samplers (`solver`), its patcher (`patch`), its loop (`sampling`)."""
