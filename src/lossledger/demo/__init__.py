"""The main job: real digits pasted on photographs, a U-Net, and two trainings with the ledger on."""
