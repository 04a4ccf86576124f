from hf_robustq.cli import main

main()
