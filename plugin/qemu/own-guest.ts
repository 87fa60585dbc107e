import { CdpError } from '../../core/errors/index.ts'
import { asObject, stringField } from '../../core/qmp/index.ts'
import type { Qmp } from '../../core/qmp/index.ts'

/** States of a QEMU that is the one end of a migration: nothing may be attached. */
const MIGRATING: readonly string[] = ['inmigrate', 'finish-migrate', 'postmigrate']

/** @throws CdpError CONFLICT while the VM is not this QEMU's: it is still to come, or has gone */
export const requireOwnGuest = async (qmp: Pick<Qmp, 'execute'>): Promise<void> => {
  const status = stringField(asObject(await qmp.execute('query-status'), 'query-status'), 'status')
  if (MIGRATING.includes(status)) throw new CdpError('CONFLICT', `a migration of the VM is not over: its QEMU is in the state ${status}`, { retry: true, hint: 'Wait for its end.' })
}
