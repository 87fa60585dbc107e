import { readFileSync } from 'node:fs'

const TICKS_PER_SEC = 100

/** CPU time of a process, all its threads, user and system, in seconds (proc(5): utime and stime are in ticks of 10 ms). */
export const cpuSecondsOf = (pid: number): number => {
  const text = readFileSync(`/proc/${pid}/stat`, 'utf8')
  const fields = text.slice(text.lastIndexOf(')') + 2).split(' ')
  return (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SEC
}

/** The largest resident size a process has had. */
export const peakResidentBytesOf = (pid: number): number => Number(/^VmHWM:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1] ?? 0) * 1024

/** What a process has in memory, what it shares with others in part only (proc(5): Pss of smaps_rollup). */
export const ownBytesOf = (pid: number): number => Number(/^Pss:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/smaps_rollup`, 'utf8'))?.[1] ?? 0) * 1024
