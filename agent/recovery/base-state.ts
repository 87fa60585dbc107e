import { join } from 'node:path'
import { CdpError } from '../../core/errors/index.ts'
import { loadVmState } from '../journal/index.ts'
import type { VmState } from '../journal/index.ts'

/** vm.json of a VM. @throws CdpError NOT_FOUND if the VM has no replica here, FORMAT */
export const readBaseState = async (vmDirectory: string): Promise<VmState> => {
  const path = join(vmDirectory, 'vm.json')
  const state = await loadVmState(path)
  if (state === undefined) throw new CdpError('NOT_FOUND', 'this VM has no replica here', { context: { path } })
  return state
}

/** The record is below what the mirror holds, or is being brought to. */
export const leftHistory = (vm: string, seq: number, recoverableFromSeq: number): CdpError =>
  new CdpError('NOT_FOUND', `sequence ${seq} of ${vm} has left the history`, { hint: 'choose a later checkpoint', context: { seq, recoverableFromSeq } })
