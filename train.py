from rlhf_trl.cli import main

main()
