import sys; sys.path.insert(0,'.')
import torch, triton
from benchmarks import gpu_chunk
from benchmarks.gpu_chunk import *
from codec import kvstream_triton as kt
dev=torch.device('cuda')
L,H,D,T=32,8,128,1536
def bench(f): return triton.testing.do_bench(f,warmup=10,rep=50,return_mode="median")
c=made_codec(L,H,D); m=kt.DeviceModel(c,dev)
best={}
for level in (1,2):
    data=made_chunk(c,m,level,T); chunk=c.check(container.parse(data)); f=m.level(level)
    fine=rans_triton.upload(chunk.section("fine"),f.fine,T) if f.fine else None
    nothing=escapes.parse(b"",len(f.tables.rows),T)
    out=torch.empty((L,2,T,H,D),dtype=torch.float16,device=dev)
    combos=[(b,t,w,s) for b in (32,64,128) for t in (1,2,4,12) for w in (4,8) for s in (1,2) if not (t==1 and s==2) and not (b==32 and w==8)]
    if level==2: combos=sorted(best,key=best.get)[:5]
    for tl_ in combos:
        kt.SYNTHESIS=kt.Tiling(*tl_)
        try:
            job=kt.Job(m,level,range(T),StridedTarget(out))
            if fine: job.further_bits(fine)
            t=bench(lambda: job.values(nothing)); best[tl_]=t if level==1 else best[tl_]
            print(level,"synthesis",tl_,f"{t*1e3:.0f} us {out.numel()*2/t/1e6:.0f} GB/s",flush=True)
        except Exception as e: print(tl_,type(e),str(e)[:200])
    if level==1: print("BEST", sorted(best,key=best.get)[:4], flush=True)
kv=(torch.randn((L,2,T,H,D),device=dev)*2).half()
besta={}
for level in (1,2):
    combos=[(b,t,w,s) for b in (32,64,128) for t in (1,4,12) for w in (4,8) for s in (1,) if not (b==32 and w==8)]
    if level==2: combos=sorted(besta,key=besta.get)[:3]
    for tl_ in combos:
        kt.ANALYSIS=kt.Tiling(*tl_)
        try:
            t=bench(lambda: kt.launch_quantise(m,kv,level,range(T))); besta[tl_]=t if level==1 else besta[tl_]
            print(level,"analysis",tl_,f"{t*1e3:.0f} us {kv.numel()*2/t/1e6:.0f} GB/s",flush=True)
        except Exception as e: print(tl_,type(e),str(e)[:200])
kt.SYNTHESIS=kt.Tiling(*min(best,key=best.get)); kt.ANALYSIS=kt.Tiling(*min(besta,key=besta.get))
class Tab:
    def add(self,name,work,**k):
        t=bench(work); print(f"{name:50} {t*1e3:.0f} us {kv.numel()*2/t/1e6:.0f} GB/s", k.get("bits"),flush=True)
    def wall(self,name,s,**k): print(name,s*1e3,"ms")
gpu_chunk.rows(Tab(),L,H,D,T,dev)
