export PYTHONUNBUFFERED=1 PYTHONPATH=/tmp/site:$PWD
[ -d /tmp/site ] || python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/site ../../.whl/*.whl
timeout 130 python3 benchmarks/codec_gpu.py --out $OUT/h200-codec.json 2>&1 | tail -60
timeout 60 python3 -m pytest tests/codec/test_kvstream_triton.py -q -x -p no:cacheprovider 2>&1 | tail -15
