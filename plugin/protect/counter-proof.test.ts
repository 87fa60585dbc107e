import { describe, expect, test } from '@jest/globals'
import { CounterProof } from './counter-proof.ts'

const MAX_IN_FLIGHT = 16_000

/** A disk: the guest's writes pass capture unless the job is orphaned; QEMU counts what is complete. */
class ModelDisk {
  captured = 0
  written: number
  inFlight: number[] = []
  failedOperations = 0

  constructor(uncapturedBytes: number) {
    this.written = uncapturedBytes
  }

  begin(bytes: number): void {
    this.captured += bytes
    this.inFlight.push(bytes)
  }

  finish(): void {
    this.written += this.inFlight.shift() ?? 0
  }

  look(proof: CounterProof, between: () => void = () => undefined, drained = false): { ok: boolean; missedBytes: number } {
    const capturedBeforeBytes = this.captured
    between()
    if (drained) while (this.inFlight.length > 0) this.finish()
    const writtenBytes = this.written
    between()
    return proof.look({ capturedBeforeBytes, capturedAfterBytes: this.captured, writtenBytes, failedOperations: this.failedOperations, drained })
  }
}

describe('CounterProof', () => {
  test('writes in flight are never a false alarm', () => {
    let state = 1
    const random = (below: number): number => (state = (Math.imul(state, 1_103_515_245) + 12_345) & 0x7fff_ffff) % below
    for (let run = 0; run < 200; run++) {
      const disk = new ModelDisk(random(1_000_000))
      const proof = new CounterProof(MAX_IN_FLIGHT)
      const step = (): void => {
        for (let n = random(6); n > 0; n--) {
          if (disk.inFlight.length < 16 && random(2) === 0) disk.begin(1 + random(1000))
          else disk.finish()
        }
      }
      for (let n = 0; n < 20; n++) {
        step()
        const verdict = disk.look(proof, step, random(4) === 0)
        if (!verdict.ok) throw new Error(`run ${run}: ${verdict.missedBytes} bytes called missed`)
      }
    }
    expect(state).not.toBe(1)
  })

  test('a write that stays in flight over any number of looks is no false alarm', () => {
    const disk = new ModelDisk(5000)
    const proof = new CounterProof(MAX_IN_FLIGHT)
    disk.look(proof, undefined, true)
    disk.begin(512)
    for (let looks = 0; looks < 3; looks++) expect(disk.look(proof).ok).toBe(true)
    disk.finish()
    expect(disk.look(proof).ok).toBe(true)
    disk.written += 512
    expect(disk.look(proof)).toEqual({ ok: false, missedBytes: 512 })
  })

  test('bytes that were not captured are found: at once when a drained look came before, at last beyond what may be in flight', () => {
    const disk = new ModelDisk(5000)
    const idle = new CounterProof(MAX_IN_FLIGHT)
    disk.begin(512)
    disk.finish()
    expect(disk.look(idle, undefined, true).ok).toBe(true)
    expect(disk.look(idle).ok).toBe(true)
    disk.written += 512
    expect(disk.look(idle)).toEqual({ ok: false, missedBytes: 512 })

    const busy = new CounterProof(MAX_IN_FLIGHT)
    disk.look(busy)
    disk.written += MAX_IN_FLIGHT + 512
    expect(disk.look(busy)).toEqual({ ok: false, missedBytes: 512 })
    expect(disk.look(busy).ok).toBe(false)
  })

  test('what others write through our node hides nothing of the guest', () => {
    const disk = new ModelDisk(0)
    const proof = new CounterProof(MAX_IN_FLIGHT)
    disk.look(proof, undefined, true)
    // Captured, but not the guest's: QEMU does not count it.
    disk.captured += 4096
    expect(disk.look(proof, undefined, true).ok).toBe(true)
    expect(disk.look(proof).ok).toBe(true)
    disk.written += 512
    expect(disk.look(proof)).toEqual({ ok: false, missedBytes: 512 })
  })

  test('a write that failed at the source is a mismatch, once', () => {
    const disk = new ModelDisk(0)
    disk.failedOperations = 3
    const proof = new CounterProof(MAX_IN_FLIGHT)
    expect(disk.look(proof).ok).toBe(true)
    disk.failedOperations = 4
    expect(disk.look(proof)).toEqual({ ok: false, missedBytes: 0 })
    expect(disk.look(proof).ok).toBe(true)
  })
})
