"""What the recipes share: settings and one function a stage."""
